"""jdm.data.labels: which labels stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.data.labels import hide_labels
from jdm.data.pipeline import train_batches


def kept(labels, fraction, seed=0) -> list[int]:
    """The rows whose labels stay, after seeing that they are what they were."""
    before, hidden = labels.copy(), hide_labels(labels, fraction, 0, seed)
    np.testing.assert_array_equal(labels, before)
    assert hidden.dtype == labels.dtype
    assert ((hidden == labels) | (hidden == -1)).all()
    return np.flatnonzero((hidden >= 0).reshape(len(labels), -1).any(axis=1)).tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-1, 4), min_size=20, max_size=200),
    st.floats(0.1, 1),
    st.integers(0, 2**31 - 1),
)
def test_the_share_is_kept_of_the_whole_and_of_each_class(labels, fraction, seed):
    labels = np.array([*labels, *range(5)] * 2, np.int32)
    rows = kept(labels, fraction, seed)
    assert len(rows) == round(fraction * (labels >= 0).sum())
    of_class, counts = np.bincount(labels[rows], minlength=5), np.bincount(labels[labels >= 0])
    assert (np.abs(of_class - fraction * counts) < 1).all()


def test_equal_classes_keep_equal_shares():
    labels = np.arange(1000, dtype=np.int32) % 10
    rows = kept(labels, 0.04)
    assert np.bincount(labels[rows]).tolist() == [4] * 10
    assert kept(labels, 1.0) == list(range(1000))
    # Parts of a label: 2.5 of each of ten classes are 25.
    assert sorted(np.bincount(labels[kept(labels, 0.025)])) == [2] * 5 + [3] * 5


def test_which_labels_stay_follows_from_the_seed_alone():
    labels = np.arange(1000, dtype=np.int32) % 10
    assert kept(labels, 0.1, seed=3) == kept(labels, 0.1, seed=3) != kept(labels, 0.1, seed=4)
    # A saved run means these rows, under every version of numpy.
    assert kept(np.zeros(20, np.int32), 0.2, seed=7) == [1, 3, 10, 12]


def test_batches_of_any_size_and_host_hold_the_same_labels():
    labels = hide_labels(np.arange(40, dtype=np.int32) % 4, 0.3, 0, seed=1)
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    for size, hosts in ((8, 1), (20, 1), (8, 2)):
        seen = np.full(40, 9)
        for host in range(hosts):
            batches = train_batches(images, labels, batch_size=size, seed=5, host=host, hosts=hosts)
            for batch, _ in zip(batches, range(40 // size), strict=False):
                seen[batch["image"][:, 0, 0, 0]] = batch["label"]
        np.testing.assert_array_equal(seen, labels)


def test_several_labels_are_hidden_row_by_row():
    labels = np.random.default_rng(0).integers(0, 2, size=(50, 6)).astype(np.int8)
    labels[:10] = -1  # never had any
    labels[10:20, 0] = -1
    rows = kept(labels, 0.25)
    assert len(rows) == 10 and min(rows) >= 10
    np.testing.assert_array_equal(hide_labels(labels, 0.25, 0, 0)[rows], labels[rows])


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_share_out_of_range_is_one_sentence(fraction):
    with pytest.raises(ValueError, match=rf"^data\.labelled_fraction={fraction} must be above 0"):
        hide_labels(np.zeros(3, np.int32), fraction, 0, 0)


def test_a_share_that_leaves_nothing_is_one_sentence():
    labels = np.zeros(30, np.int32)
    sentence = r"data\.labelled_fraction=0\.01 of 30 labels leaves none$"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        hide_labels(labels, 0.01, 0, 0)
    assert (hide_labels(np.full(3, -1, np.int32), 0.01, 0, 0) == -1).all()  # there was none to keep


def test_so_many_of_each_class():
    labels = np.random.default_rng(0).permutation(np.arange(300, dtype=np.int32) % 7)
    labels[:30] = -1
    hidden = hide_labels(labels, 1.0, 12, seed=3)
    assert np.bincount(hidden[hidden >= 0]).tolist() == [12] * 7
    assert ((hidden == labels) | (hidden == -1)).all()
    assert (hidden != hide_labels(labels, 1.0, 12, seed=4)).any()


@pytest.mark.parametrize(
    ("labels", "fraction", "per_class", "said"),
    [
        ([0, 0, 1], 1.0, 2, "data.labelled_per_class=2 is more than the 1 images of class 1"),
        ([0, 1], 0.5, 1, "data.labelled_per_class=1 does not go with data.labelled_fraction=0.5"),
        ([[0, 1], [1, 1]], 1.0, 1, "data.labelled_per_class=1 is for one class an image"),
    ],
)
def test_what_cannot_be_hidden_is_one_sentence(labels, fraction, per_class, said):
    with pytest.raises(ValueError) as info:
        hide_labels(np.array(labels, np.int32), fraction, per_class, 0)
    assert str(info.value).startswith(said) and "\n" not in str(info.value)
