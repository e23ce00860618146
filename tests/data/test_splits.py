"""From prepared files to arrays: what is read, kept on disk, and refused."""

import dataclasses
import itertools
import pathlib
import shutil

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorflow_datasets.core.features import image_feature

from jdm.data import records
from jdm.data.datasets import DATASETS, Dataset
from jdm.data.decoding import decode
from jdm.data.lookup import dataset
from jdm.data.pipeline import train_batches
from jdm.data.prepare import prepare
from jdm.data.splits import (
    ReadOptions,
    keep_classes,
    load_split,
    split_names,
    split_rows,
    training_set,
)
from jdm.errors import InvalidValue

PREPARE_AND_READ = """
import importlib.machinery, socket, sys

def no_network(*args, **kwargs):
    raise AssertionError("asked the network")
socket.getaddrinfo = socket.socket.connect = no_network

# A machine without TensorFlow, whatever is installed here.
find = importlib.machinery.PathFinder.find_spec
def hide(cls, name, path=None, target=None):
    return None if name.split(".")[0] == "tensorflow" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(hide)

from jdm.data.splits import ReadOptions, load_split
images, labels = load_split("digits", "validation", ReadOptions(sys.argv[1]))
assert images.shape == (180, 8, 8, 1) and labels.shape == (180,)
assert not {"tensorflow", "jax"} & set(sys.modules)
"""

# Each process waits until the other has begun, so that neither finds the data prepared.
PREPARE_TOGETHER = """
import pathlib, sys, time
from jdm.data import digits
from jdm.data.splits import ReadOptions, load_split

me, other = (pathlib.Path(sys.argv[1]) / f"begun-{i}" for i in sys.argv[2:])
generators = digits.Digits._split_generators

def wait_then_generate(self, dl_manager):
    me.touch()
    while not other.exists():
        time.sleep(0.01)
    return generators(self, dl_manager)

digits.Digits._split_generators = wait_then_generate
assert len(load_split("digits", "test", ReadOptions(sys.argv[1])).images) == 360
assert me.exists()
"""


def test_preparing_and_reading_are_quiet_and_need_no_tensorflow_or_network(start_python, tmp_path):
    process = start_python(PREPARE_AND_READ, str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == ""
    preparing, decoding = err.splitlines()
    assert preparing == f"Preparing digits in {tmp_path / 'digits' / '1.0.0'}."
    assert decoding.startswith(f"Decoding 180 images of digits to {tmp_path / 'jdm_decoded'}/")


def test_two_processes_may_prepare_at_once(start_python, tmp_path):
    pair = [start_python(PREPARE_TOGETHER, str(tmp_path), a, b) for a, b in ("01", "10")]
    for process in pair:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # none incomplete


def test_a_data_dir_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        load_split("digits", "test", ReadOptions(str(tmp_path / "file")))


def test_a_tilde_in_data_dir_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load_split("digits", "validation", ReadOptions("~/data"))
    assert (tmp_path / "home" / "data" / "digits" / "1.0.0").is_dir()
    assert not (tmp_path / "~").exists()


def test_unknown_names_and_splits(digits_dir):
    options = ReadOptions(digits_dir)
    said = r"^config\.data\.name='mnits' is unknown; .*; did you mean mnist\?$"
    with pytest.raises(InvalidValue, match=said):
        load_split("mnits", "train", options)
    said = "^split='val' is unknown; digits has train, validation, test$"
    with pytest.raises(InvalidValue, match=said):
        load_split("digits", "val", options)


def flip_a_bit_of_a_pixel(folder: pathlib.Path) -> None:
    path = next(folder.glob("*test.array_record*"))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT", len(data) // 10) + 8] ^= 1
    path.write_bytes(data)


def cut_the_records_short(folder: pathlib.Path) -> None:
    path = next(folder.glob("*test.array_record*"))
    path.write_bytes(path.read_bytes()[: 1 << 16])


def forget_the_records(folder: pathlib.Path) -> None:
    next(folder.glob("*test.array_record*")).unlink()


def forget_what_it_is(folder: pathlib.Path) -> None:
    (folder / "dataset_info.json").unlink()


def count_wrongly(folder: pathlib.Path) -> None:
    """As if an interrupted or older preparation had left fewer records, none of them damaged."""
    path = folder / "dataset_info.json"
    assert '"360"' in path.read_text()
    path.write_text(path.read_text().replace('"360"', '"359"'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit_of_a_pixel, "hash mismatch"),
        (cut_the_records_short, "record 0 is empty"),
        (forget_the_records, "No such file"),
        (forget_what_it_is, "has not been generated"),
        (count_wrongly, "359 images in test instead of 360"),
    ],
)
def test_damaged_files_are_never_read_as_images(damage, reason, digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "jdm_decoded")
    folder = tmp_path / "digits" / "1.0.0"
    damage(folder)
    with pytest.raises(RuntimeError, match=f"{reason}.* delete that folder") as info:
        load_split("digits", "test", ReadOptions(str(tmp_path)))
    assert str(info.value).startswith(f"the prepared files of digits in {folder} cannot be read")


# The downloaded data sets, as far as they can be tested without a download -----------------------


@pytest.fixture
def mocked(monkeypatch):
    """Every data set of the table, as if prepared, with five random records by TFDS."""

    def encode(self, pixels):
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        return self._encode_pil_image(Image.fromarray(pixels))

    # TFDS would need TensorFlow to encode its random images.
    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    monkeypatch.setattr(records, "prepared", records.make_builder)
    with tfds.testing.mock_data(num_examples=5):
        yield


DOWNLOADED = [name for name, facts in DATASETS.items() if facts.download]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_the_table_agrees_with_tfds(mocked, name, tmp_path):
    facts = dataset(name)
    of_five = dataclasses.replace(facts, splits={"train": 5}, from_train=())
    found = records.Records(of_five, "train", str(tmp_path))
    # One by one: the mocked source of TFDS cannot read several records.
    some = [found._record(i, found._source[i]) for i in range(len(found))]
    assert len(some) == 5
    for one in some:
        for size in facts.sizes:
            assert decode(one["image"], size, facts.channels).shape == (size, size, facts.channels)
        if facts.multi_label:
            assert one["label"].shape == (facts.num_classes,) and one["label"].dtype == np.int8
            assert set(one["label"]) <= {0, 1}
        else:
            assert one["label"].dtype == np.int32 and 0 <= one["label"] < facts.num_classes
    features = records.make_builder(facts, str(tmp_path)).info.features
    if not facts.multi_label:
        assert features["label"].num_classes == facts.num_classes
    assert features["image"].shape[-1] == facts.channels


@pytest.mark.parametrize("name", DOWNLOADED)
def test_downloads_are_as_large_as_the_table_says(name):
    root = pathlib.Path(tfds.__file__).parent
    files = [root / "url_checksums" / f"{name}.txt", root / "datasets" / name / "checksums.tsv"]
    (path,) = (path for path in files if path.exists())
    assert sum(int(line.split()[1]) for line in path.read_text().splitlines()) == (
        DATASETS[name].download
    )


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_data_set_that_is_not_prepared_names_the_command(name, tmp_path):
    with pytest.raises(records.DataError) as info:
        load_split(name, "train", ReadOptions(str(tmp_path)))
    said = str(info.value)
    assert said.startswith(f"{name} is not prepared in {tmp_path}")
    assert said.endswith(f"; run jdm data prepare {name} --data_dir={tmp_path}")
    assert list(tmp_path.iterdir()) == []


# Which images, and which labels -------------------------------------------------------------------


def facts_of(**facts) -> Dataset:
    """A data set of four classes."""
    return Dataset(
        "x", sizes=(), channels=1, num_classes=4, flips=True, splits={"train": 1}, **facts
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=300), st.floats(0.05, 0.5))
def test_a_held_out_split_is_disjoint_and_takes_each_class_in_proportion(labels, share):
    labels = np.array(labels, np.int32)
    facts = facts_of()
    train, validation = (split_rows(facts, s, labels, share) for s in ("train", "validation"))
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert len(validation) == round(share * len(labels))
    parts, counts = np.bincount(labels[validation], minlength=4), np.bincount(labels, minlength=4)
    assert (np.abs(parts - len(validation) / len(labels) * counts) < 1).all()
    np.testing.assert_array_equal(validation, split_rows(facts, "validation", labels, share))


def test_a_data_set_of_one_split_gets_three_that_never_change():
    facts, labels = DATASETS["malaria"], np.arange(27_558, dtype=np.int32) % 2
    rows = {split: split_rows(facts, split, labels, 0.05) for split in facts.splits}
    assert {split: len(some) for split, some in rows.items()} == facts.splits
    assert len(np.unique(np.concatenate(list(rows.values())))) == 27_558
    assert rows["test"][:4].tolist() == [6, 11, 19, 20]


def test_names_of_the_splits_that_can_be_read():
    assert split_names(DATASETS["mnist"], 0.1) == ("train", "test", "validation")
    assert split_names(DATASETS["mnist"], 0.0) == ("train", "test")
    assert split_names(DATASETS["digits"], 0.1) == ("train", "validation", "test")


def test_classes_are_kept_in_the_order_of_their_new_labels():
    labels = np.array([0, 1, 2, 3, 3, -1], np.int32)
    kept, new = keep_classes(labels, (3, 1), facts_of())
    assert kept.tolist() == [False, True, False, True, True, True]
    assert new[kept].tolist() == [1, 0, 0, -1]
    attributes = np.array([[0, 1, 1, 0], [1, -1, 0, 0]], np.int8)
    kept, new = keep_classes(attributes, (3, 1), facts_of(multi_label=True))
    assert kept.all() and new.tolist() == [[0, 1], [0, -1]]
    with pytest.raises(ValueError, match=r"^config\.data\.classes=\(1, 4\) must be .* from 0 to 3"):
        keep_classes(labels, (1, 4), facts_of())


def training_digits(digits_dir, classes=(), **options):
    """(images, labels) of a training set, gathered."""
    options_of_reading = ReadOptions(digits_dir, classes=classes)
    images, labels = training_set("digits", options_of_reading, seed=3, **options)
    return images[np.arange(len(images))], labels


def test_a_limit_takes_each_class_in_proportion(digits_dir):
    whole, _ = training_digits(digits_dir)
    some, labels = training_digits(digits_dir, limit=100)
    assert len(some) == 100 and set(np.bincount(labels)) <= {9, 10, 11}
    pixels = {image.tobytes() for image in whole}
    assert all(image.tobytes() in pixels for image in some)
    assert len(training_digits(digits_dir, limit=10_000)[0]) == len(whole)


def test_classes_limit_and_hidden_labels_go_together(digits_dir):
    images, labels = training_digits(digits_dir, classes=(7, 2), limit=60, labelled_per_class=5)
    assert len(images) == 60 and np.bincount(labels + 1).tolist() == [50, 5, 5]
    two_classes = ReadOptions(digits_dir, classes=(7, 2))
    held_out, theirs = load_split("digits", "validation", two_classes)
    everything, old = load_split("digits", "validation", ReadOptions(digits_dir))
    assert set(theirs) == {0, 1}
    np.testing.assert_array_equal(held_out[theirs == 0], everything[old == 7])
    np.testing.assert_array_equal(held_out[theirs == 1], everything[old == 2])


def test_a_second_data_set_adds_its_images_without_labels(digits_dir, tmp_path):
    """Labelled images of one data set and unlabelled images of another, in the same shape."""
    folder = tmp_path / "others"
    for i in range(30):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 20, 3), i, np.uint8)).save(path)
    shutil.copytree(digits_dir, tmp_path / "data")
    prepare(f"folder:{folder}", str(tmp_path / "data"))
    options = ReadOptions(str(tmp_path / "data"), 8, 1, classes=range(10), validation=0.2)
    images, labels = training_set("digits", options, seed=0, unlabelled=f"folder:{folder}")
    assert len(images) == 1257 + 24  # a fifth of theirs is held out too
    assert (labels[:1257] >= 0).all() and (labels[1257:] == -1).all()
    for batch in itertools.islice(train_batches(images, labels, batch_size=64, seed=0), 5):
        theirs = batch["image"][batch["label"] < 0]
        assert batch["image"].shape == (64, 8, 8, 1) and (np.ptp(theirs, axis=(1, 2, 3)) == 0).all()


def test_images_of_another_size_and_number_of_channels(digits_dir):
    images, _ = load_split("digits", "validation", ReadOptions(digits_dir, size=16, channels=3))
    plain, _ = load_split("digits", "validation", ReadOptions(digits_dir))
    assert images.shape == (180, 16, 16, 3)
    assert np.abs(images[:, ::2, ::2, :1].astype(float) - plain).mean() < 40


def test_copies_of_the_records_share_decoded_images(digits_dir, tmp_path):
    for here in ("one", "two"):
        shutil.copytree(pathlib.Path(digits_dir) / "digits", tmp_path / here / "digits")
        next((tmp_path / here).rglob("*test.array_record*")).touch()  # another modification time
        options = ReadOptions(str(tmp_path / here), cache_dir=str(tmp_path / "shared"))
        load_split("digits", "test", options)
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_data_that_is_prepared_in_another_format_is_one_sentence(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(records.DataError, match="^digits is prepared in .* in another format"):
        load_split("digits", "test", ReadOptions(str(tmp_path)))


def test_with_workers_only_labels_are_kept_on_disk(digits_dir, tmp_path):
    options = ReadOptions(digits_dir, classes=(1, 2), cache_dir=str(tmp_path), workers=1)
    decoded_now = load_split("digits", "test", options)
    assert all("-labels-" in path.name for path in tmp_path.iterdir())
    kept = load_split("digits", "test", dataclasses.replace(options, workers=0))
    chex.assert_trees_all_equal(tuple(decoded_now), tuple(kept), strict=True)


def test_at_least_one_image_is_held_out():
    assert len(split_rows(facts_of(), "validation", np.zeros(5, np.int32), 0.05)) == 1


def test_decoded_images_are_kept_in_cache_dir(digits_dir, tmp_path):
    load_split("digits", "test", ReadOptions(digits_dir, cache_dir=str(tmp_path / "here")))
    assert [path.name[:20] for path in (tmp_path / "here").iterdir()] == ["digits-1.0.0-test-8x"]
