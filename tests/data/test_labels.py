"""jdm.data.labels: which labels are kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.data.labels import hide_labels
from jdm.data.pipeline import train_batches
from jdm.errors import InvalidValue


def kept(labels, fraction, seed=0) -> list[int]:
    """The rows whose labels are kept, after checking that these labels are unchanged."""
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
def test_the_fraction_is_kept_of_all_labels_and_of_each_class(labels, fraction, seed):
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
    # 25 labels of ten classes: 2 or 3 of each.
    assert sorted(np.bincount(labels[kept(labels, 0.025)])) == [2] * 5 + [3] * 5


def test_which_labels_are_kept_depends_on_the_seed_alone():
    labels = np.arange(1000, dtype=np.int32) % 10
    assert kept(labels, 0.1, seed=3) == kept(labels, 0.1, seed=3) != kept(labels, 0.1, seed=4)
    # The rows of saved runs, with every version of numpy.
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


def test_k_labels_for_each_image_are_hidden_row_by_row():
    labels = np.random.default_rng(0).integers(0, 2, size=(50, 6)).astype(np.int8)
    labels[:10] = -1  # unlabelled
    labels[10:20, 0] = -1
    rows = kept(labels, 0.25)
    assert len(rows) == 10 and min(rows) >= 10
    np.testing.assert_array_equal(hide_labels(labels, 0.25, 0, 0)[rows], labels[rows])


def test_a_fraction_that_leaves_no_label_is_one_sentence():
    labels = np.zeros(30, np.int32)
    said = r"^config\.data\.labelled_fraction=0\.01 of 30 labels leaves none$"
    with pytest.raises(InvalidValue, match=said):
        hide_labels(labels, 0.01, 0, 0)
    assert (hide_labels(np.full(3, -1, np.int32), 0.01, 0, 0) == -1).all()  # none to keep


def test_a_number_of_labels_in_each_class():
    labels = np.random.default_rng(0).permutation(np.arange(300, dtype=np.int32) % 7)
    labels[:30] = -1
    hidden = hide_labels(labels, 1.0, 12, seed=3)
    assert np.bincount(hidden[hidden >= 0]).tolist() == [12] * 7
    assert ((hidden == labels) | (hidden == -1)).all()
    assert (hidden != hide_labels(labels, 1.0, 12, seed=4)).any()


def test_more_labels_than_a_class_has_are_one_sentence():
    said = r"^config\.data\.labelled_per_class=2 is more than the 1 images of class 1$"
    with pytest.raises(InvalidValue, match=said):
        hide_labels(np.array([0, 0, 1], np.int32), 1.0, 2, 0)
