"""A folder of the user's own images: what is listed, prepared and refused."""

import io
import os
import signal
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from jdm.data import DataError, folder_builder
from jdm.data.decoding import decode
from jdm.data.folder import listing
from jdm.data.lookup import dataset
from jdm.data.prepare import prepare
from jdm.data.records import is_prepared
from jdm.data.splits import ReadOptions, Split, load_split, training_set

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def new_listing():
    """A process lists a folder once, but these tests change their folders."""
    listing.cache_clear()
    yield
    listing.cache_clear()


def read(name: str, data_dir: str, split: str = "train", size: int = 8, channels: int = 3) -> Split:
    return load_split(name, split, ReadOptions(data_dir, size, channels))


def draw(path, size=(8, 8), mode="RGB"):
    """Writes an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    Image.fromarray(RNG.integers(0, 256, size=shape, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, with files of several formats, sizes and depths."""
    root = tmp_path / "pets"
    for i in range(6):
        draw(root / "cat" / f"{i}.png")
    draw(root / "cat" / "wide.JPG", size=(20, 12))
    draw(root / "dog" / "grey.png", mode="L")
    draw(root / "dog" / "more" / "tall.jpeg", size=(9, 30))
    (root / "dog" / "notes.txt").write_text("good dog")
    (root / ".hidden").mkdir()
    return root


def test_a_folder_has_facts_like_an_entry_of_the_table(folder):
    facts = dataset(f"folder:{folder}")
    assert facts.num_classes == 2 and facts.splits == {"train": 9}
    assert listing(str(folder)).classes == ("cat", "dog")


def test_what_was_understood_is_printed(folder, tmp_path, capfd):
    draw(folder / "cat" / "0.webp")
    draw(folder / "loose.png")
    (folder / "dog" / "more" / "up").symlink_to(folder / "dog")
    prepare(f"folder:{folder}", str(tmp_path / "data"))
    assert capfd.readouterr().out.splitlines() == [
        f"folder:{folder} is read as",
        "class  train",
        "0 cat      7",
        "1 dog      2",
        "all        9",
        "left out: files with the ending .txt: 1",
        "left out: files with the ending .webp: 1",
        "left out: hidden files or folders: 1",
        "left out: images in no folder of a class: 1",
        "left out: links to a folder above: 1",
    ]


def test_what_a_named_data_set_is_is_printed(digits_dir, capfd):
    prepare("digits", digits_dir)
    said = "digits: train 1,257, validation 180, test 360 images, 10 classes\n"
    assert capfd.readouterr().out == said


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("Training", "DEV", "Testing"), ("TRAIN", "Valid", "test")],
)
def test_splits_have_their_usual_names_in_any_case(tmp_path, names):
    for name in names:
        for one in ("a", "b"):
            draw(tmp_path / "split" / name / one / "0.png")
    (tmp_path / "split" / "docs").mkdir()
    found = listing(str(tmp_path / "split"))
    assert dict(found.folders) == dict(zip(("train", "validation", "test"), names, strict=True))
    assert list(found.left_out) == ["folder 'docs', which has no images"]
    for split, name in found.folders.items():  # the name of the folder is shown where it is another
        assert (f"{split} ({name})" in str(found).splitlines()[0]) == (name != split)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ("train/a Training/a", "has two folders of the split train, 'Training' and 'train'; put "),
        ("cat dog test/cat", "has 'test', the name of a split, beside 'cat', which is none; move "),
        ("cat dog Test", "has 'Test', the name of a split, beside 'cat', which is none; move "),
        ("train/a train/b more/a", "'train', the name of a split, beside 'more', which is none"),
        ("test/a val/a", "has 'test' and 'val', but no folder 'train'"),
        ("train test", "has no sub-folders in 'train'; one for each class is needed"),
        ("train/a train/b Test", "has no PNG or JPEG file in test"),
    ],
)
def test_a_layout_that_could_mean_two_things_is_one_sentence(tmp_path, paths, said):
    for path in paths.split():
        draw(tmp_path / "x" / path / "0.png")
    with pytest.raises(ValueError) as info:
        listing(str(tmp_path / "x"))
    assert said in str(info.value) and "\n" not in str(info.value)


def test_classes_that_look_like_splits_of_other_names_are_noted(tmp_path):
    for path in ("set_1/cat", "set_1/dog", "set_2/cat", "set_2/dog"):
        draw(tmp_path / "x" / path / "0.png")
    last = str(listing(str(tmp_path / "x"))).splitlines()[-1]
    assert last.startswith("note: every class has the same sub-folders (cat, dog); if these are ")


def no_text(name: str) -> str:
    """A file name with a byte that is no UTF-8."""
    return os.fsdecode(name.encode() + b"\xe9")


def test_names_that_are_no_text_are_shown_and_stored_as_text(folder, tmp_path, monkeypatch, run):
    mine = folder.rename(tmp_path / no_text("pets"))
    (mine / "dog").rename(mine / no_text("dog"))
    (mine / "cat" / (no_text("a\nb") + ".png")).write_bytes(b"broken")
    prepared = ["data", "prepare", f"folder:{mine}", f"--data_dir={tmp_path / 'data'}"]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with monkeypatch.context() as strict:  # as stdout is in most terminals
        strict.setattr(sys, "stdout", out)
        strict.setattr(sys, "stderr", err)
        status = run(*prepared).returncode
        assert status == 1 and run(*prepared, "--skip-broken", "--size=8").returncode == 0
        out.flush(), err.flush()
    said, warned = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert "\n1 dog\ufffd      2\n" in said and "pets\\udce9 is prepared in" in said
    assert "\nleft out: cat/a\ufffdb\ufffd.png (not an image)\n" in warned
    listing.cache_clear()
    _, labels = read(f"folder:{mine}", str(tmp_path / "data"))
    assert labels.tolist() == [0] * 7 + [1] * 2


def test_classes_whose_names_differ_only_in_bytes_stay_different(tmp_path):
    for name in (b"\xe8", b"\xe9"):
        draw(tmp_path / "x" / os.fsdecode(name) / "0.png")
    assert listing(str(tmp_path / "x")).classes == ("\\xe8", "\\xe9")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_labels_match_the_files(folder, tmp_path, channels):
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    prepare(name, data_dir)
    images, labels = read(name, data_dir, channels=channels)
    assert images.shape == (9, 8, 8, channels) and labels.tolist() == [0] * 7 + [1] * 2
    files = [*sorted((folder / "cat").iterdir()), folder / "dog" / "grey.png"]
    for image, path in zip(images, [*files, folder / "dog" / "more" / "tall.jpeg"], strict=True):
        np.testing.assert_array_equal(image, decode(path.read_bytes(), 8, channels))


def test_a_folder_with_splits(folder, tmp_path):
    name, data_dir = f"folder:{tmp_path / 'split'}", str(tmp_path / "data")
    for split in ("train", "val", "test"):
        for one in ("a", "b"):
            draw(tmp_path / "split" / split / one / "0.png")
    assert dataset(name).splits == {"train": 2, "validation": 2, "test": 2}
    prepare(name, data_dir)
    image, label = read(name, data_dir, "validation")
    expected = (tmp_path / "split" / "val" / "b" / "0.png").read_bytes()
    np.testing.assert_array_equal(image[1], decode(expected, 8, 3))
    assert label.tolist() == [0, 1]


def test_a_folder_that_changed_has_to_be_prepared_again(folder, tmp_path):
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    before = prepare(name, data_dir)
    assert not (tmp_path / "data" / "jdm_decoded").exists()
    assert prepare(name, data_dir, size=8) == before  # prepared already, now decoded
    assert len(list((tmp_path / "data" / "jdm_decoded").iterdir())) == 1
    draw(folder / "dog" / "new.png")
    listing.cache_clear()
    with pytest.raises(DataError) as info:
        read(name, data_dir)
    assert "is not prepared in" in str(info.value)
    assert str(info.value).endswith(f"run jdm data prepare {name} --data_dir={data_dir}")
    after = prepare(name, data_dir)
    assert not before.exists() and not any((tmp_path / "data" / "jdm_decoded").iterdir())
    assert len(read(name, data_dir).images) == 10
    assert [path.name for path in after.parent.parent.iterdir()] == [after.parent.name]


def test_broken_images_are_counted_and_named_or_left_out(folder, tmp_path):
    name, data_dir = f"folder:{folder}", tmp_path / "data"
    whole = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "3.png").write_bytes(b"not an image")
    with pytest.raises(DataError) as info:
        prepare(name, str(data_dir))
    said = str(info.value)
    assert said.startswith(f"2 of 9 images in {folder} cannot be read: cat/1.png (")
    assert "cat/3.png (" in said and said.endswith("; --skip-broken leaves them out")
    assert "\n" not in said
    assert not any(path.name == "1.0.0" for path in data_dir.rglob("*"))  # no final folder
    prepare(name, str(data_dir), skip_broken=True)
    images, labels = read(name, str(data_dir))
    assert labels.tolist() == [0] * 5 + [1] * 2
    np.testing.assert_array_equal(images[1], decode((folder / "cat" / "2.png").read_bytes(), 8, 3))


def bad_exif() -> bytes:
    """A PNG whose pixels can be read, but not which way is up."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG", exif=b"Exif\0\0garbage")
    return file.getvalue()


def lab_colours() -> bytes:
    """An image that cannot be converted to RGB."""
    file = io.BytesIO()
    Image.new("LAB", (9, 9)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("encoded", [bad_exif(), lab_colours()], ids=["exif", "lab"])
def test_the_check_decodes_as_the_work_that_follows(folder, tmp_path, encoded, capfd):
    """Every step of decoding is checked, so what is prepared can be decoded."""
    (folder / "cat" / "1.png").write_bytes(encoded)
    (folder / "cat" / "2.png").write_bytes(b"")
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    with pytest.raises(DataError, match=r"^2 of 9 images in .*: cat/1\.png \("):
        prepare(name, data_dir, size=8)
    capfd.readouterr()
    prepare(name, data_dir, size=8, skip_broken=True)
    said = capfd.readouterr()
    assert "left out: cat/1.png (" in said.err and "left out: cat/2.png (" in said.err
    assert said.out.endswith("left out: broken images of train: 2\n")
    assert len(read(name, data_dir).images) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_an_older_check_let_pass_is_named(folder, tmp_path, monkeypatch, workers):
    (folder / "cat" / "1.png").write_bytes(bad_exif())
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    monkeypatch.setattr(folder_builder, "check_image", lambda encoded: "")
    path = prepare(name, data_dir)
    options = ReadOptions(data_dir, 8, 3, workers=workers)
    with pytest.raises(DataError) as info:
        load_split(name, "train", options)
    assert f"{path}: image 1 cannot be decoded (" in str(info.value)
    again = (
        f"from the file cat/1.png: delete {path} and prepare the folder again with --skip-broken"
    )
    assert str(info.value).endswith(again)


def test_a_folder_of_any_name_is_prepared_and_replaced(folder, tmp_path):
    folder = folder.rename(folder.with_name("my pets, [2] * ü"))
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    before = prepare(name, data_dir, size=8)
    draw(folder / "dog" / "new.png")
    listing.cache_clear()
    prepare(name, data_dir, size=8)
    assert not before.exists() and len(list((tmp_path / "data" / "jdm_decoded").iterdir())) == 1
    assert len(read(name, data_dir).images) == 10


KILLED = """
import os, signal, sys
from jdm.data import folder_builder
from jdm.data.prepare import prepare
from jdm.data.records import is_prepared

generate = folder_builder.Folder._generate_examples

def killed(self, files):
    yield from generate(self, files[:5])
    os.kill(os.getpid(), signal.SIGKILL)

folder_builder.Folder._generate_examples = killed
prepare(*sys.argv[1:])
"""


def test_a_killed_preparation_leaves_nothing_prepared(folder, tmp_path, start_python):
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    process = start_python(KILLED, name, data_dir)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert any((tmp_path / "data").rglob("*incomplete*")) and not is_prepared(name, data_dir)
    with pytest.raises(DataError, match="is not prepared in"):
        read(name, data_dir)
    prepare(name, data_dir)
    assert len(read(name, data_dir).images) == 9


def test_a_file_that_cannot_be_opened_is_a_broken_image(folder, tmp_path):
    (folder / "cat" / "7.png").symlink_to(tmp_path / "nowhere.png")
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    with pytest.raises(DataError, match=r"^1 of 10 images .*: cat/7\.png \(No such file"):
        prepare(name, data_dir)
    prepare(name, data_dir, skip_broken=True)
    assert len(read(name, data_dir).images) == 9


def test_a_split_without_a_readable_image_is_an_error(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        draw(tmp_path / "x" / path)
    (tmp_path / "x" / "test" / "a" / "0.png").write_bytes(b"")
    name = f"folder:{tmp_path / 'x'}"
    with pytest.raises(DataError, match="^no image of test in .* can be read$"):
        prepare(name, str(tmp_path / "data"), skip_broken=True)
    (tmp_path / "x" / "test" / "a" / "0.png").unlink()
    listing.cache_clear()
    with pytest.raises(ValueError, match="/x' has no PNG or JPEG file in test$"):
        dataset(name)


def test_a_class_without_a_readable_image_is_an_error(folder, tmp_path):
    for path in (folder / "dog").rglob("*.*g"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"^no image of the class 'dog' in .* can be read$"):
        prepare(f"folder:{folder}", str(tmp_path / "data"), skip_broken=True)


def test_a_folder_without_classes_is_one_sentence(tmp_path):
    def said() -> str:
        listing.cache_clear()
        with pytest.raises(ValueError) as info:
            dataset(f"folder:{tmp_path / 'x'}")
        assert str(info.value).startswith(f"config.data.name='folder:{tmp_path / 'x'}'")
        return str(info.value)

    assert said().endswith("is not a folder")
    draw(tmp_path / "x" / "0.png")
    assert said().endswith("has no sub-folders; one for each class is needed")
    draw(tmp_path / "x" / "cat" / "0.png")
    assert said().endswith("has one class only, 'cat'; two or more are needed")
    (tmp_path / "x" / "dog").mkdir()
    assert said().endswith("has no PNG or JPEG file of the class 'dog'")


def test_training_and_evaluation_read_the_same_images(folder, tmp_path):
    name, data_dir = f"folder:{folder}", str(tmp_path / "data")
    prepare(name, data_dir)
    images, labels = read(name, data_dir)
    for workers in (0, 1):  # decoded once, or each time they are read
        options = ReadOptions(data_dir, size=8, channels=3, workers=workers)
        selection, same = training_set(name, options, seed=0)
        np.testing.assert_array_equal(selection[np.arange(9)], images)
        np.testing.assert_array_equal(same, labels)


def test_real_photographs(tmp_path, photographs):
    """CIFAR-10's JPEGs: twenty of each class, each with the label of its folder."""
    if not photographs.is_file():
        pytest.skip(f"{photographs} is not there; JDM_SHARED says where else it may be")
    taken: dict[str, int] = {}
    with tarfile.open(photographs) as archive:
        for member in archive:
            one = member.name.split("/")[1] if member.isfile() else ""
            if one and taken.setdefault(one, 0) < 20:
                taken[one] += 1
                path = tmp_path / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    assert len(taken) == 10
    name, data_dir = f"folder:{tmp_path / 'train'}", str(tmp_path / "data")
    prepare(name, data_dir)
    images, labels = read(name, data_dir, size=32)
    assert images.shape == (200, 32, 32, 3) and np.bincount(labels).tolist() == [20] * 10
    for i in (0, 57, 199):
        one = listing(str(tmp_path / "train")).classes[labels[i]]
        path = sorted((tmp_path / "train" / one).iterdir())[i % 20]
        with Image.open(path) as image:
            np.testing.assert_array_equal(images[i], np.asarray(image))
