"""What identifies the data of a run, and how other data is described."""

import copy
import shutil

import numpy as np
import pytest
from PIL import Image

from jdm.config import load_config
from jdm.data.folder import listing
from jdm.data.identity import check_same, differences, identity, identity_of_run
from jdm.data.prepare import prepare
from jdm.data.splits import ReadOptions
from jdm.errors import InvalidValue


@pytest.fixture
def pets(tmp_path):
    """Cats and dogs, and a function that prepares and identifies a folder."""
    rng = np.random.default_rng(0)
    for path in ("train/cat/0", "train/cat/1", "train/dog/0", "test/cat/0"):
        file = tmp_path / "pets" / f"{path}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)

    def identify(folder, **options):
        listing.cache_clear()
        prepare(f"folder:{folder}", str(tmp_path / "data"))
        return identity(f"folder:{folder}", ReadOptions(str(tmp_path / "data"), **options))

    yield tmp_path / "pets", identify
    listing.cache_clear()


def test_the_identity_is_that_of_the_contents(pets, tmp_path):
    folder, identify = pets
    before = identify(folder)
    assert before["class_names"] == ["cat", "dog"]
    assert before["splits"] == {"train": 3, "test": 1} and len(before["contents"]["train"]) == 16
    assert identify(folder, workers=1) == identify(folder) == before  # the second time from a file
    copied = identify(shutil.copytree(folder, tmp_path / "copy"))  # with other times and paths
    assert differences(before, copied) == []
    for file in (tmp_path / "copy").rglob("*.png"):  # as another version of the encoder would
        Image.open(file).save(file, compress_level=1)
    assert differences(before, identify(tmp_path / "copy")) == []
    image = folder / "train" / "cat" / "0.png"
    pixels = np.array(Image.open(image))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    assert differences(before, identify(folder)) == ["train has other images or labels"]


def test_other_classes_and_sizes_are_named(pets):
    folder, identify = pets
    before = identify(folder)
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / "lynx")
    now = identify(folder)
    assert now["class_names"] == ["dog", "lynx"]
    assert differences(before, now) == [
        "class 0 was 'cat' and is 'dog'",
        "class 1 was 'dog' and is 'lynx'",
        *differences(before, now | {"class_names": []}),
    ]
    (folder / "train" / "lynx" / "0.png").unlink()
    assert "train had 3 images and has 2" in differences(before, identify(folder))


def test_only_the_selected_classes_are_named(digits_dir):
    found = identity("digits", ReadOptions(digits_dir, classes=(7, 3)))
    assert found["class_names"] == ["7", "3"]
    assert found["splits"] == {"train": 1257, "validation": 180, "test": 360}


def test_the_unlabelled_data_is_part_of_it(digits_dir):
    data = load_config("tiny", [f"--config.data.dir={digits_dir}"]).copy_and_resolve_references()
    with data.unlocked():
        data.data.unlabelled = "digits"
    before = identity_of_run(data.data, ReadOptions(digits_dir))
    assert before["unlabelled"] == {k: v for k, v in before.items() if k != "unlabelled"}
    now = copy.deepcopy(before)
    now["unlabelled"]["contents"]["train"] = "other"
    said = ["of the unlabelled data, train has other images or labels"]
    assert differences(before, now) == said


def test_other_data_is_refused_in_one_sentence():
    before = dict(name="a", class_names=["x", "y"], splits={"test": 2}, contents={"test": "1"})
    check_same(before, before, "data", "evaluates")
    check_same({}, before, "data", "evaluates")  # a checkpoint that says nothing
    check_same(before, before | dict(name="b", contents={"test": "2"}), "data", "evaluates")
    with pytest.raises(InvalidValue) as info:
        check_same(before, before | {"contents": {"test": "2"}}, "data", "evaluates")
    assert str(info.value) == (
        "data='a' is not what the model was trained on: test has other images or labels; "
        "--other-data evaluates on it anyway"
    )
    with pytest.raises(InvalidValue, match="^data='b' .*: class 0 was 'x' and is 'y'; class 1 was"):
        check_same(before, before | dict(name="b", class_names=["y", "x"]), "data", "evaluates")
