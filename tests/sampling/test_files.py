"""Samples in files and folders."""

import csv
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

import jdm
from jdm import plot

SETTINGS = {"steps": 3, "scale": 8.0, "blocks": ["mid"]}


def samples_of(**changes) -> jdm.Samples:
    rng = np.random.default_rng(0)
    values = dict(
        images=rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8),
        labels=np.array([3, 4, -1, 0, 9], np.int32),
        seeds=np.array([7, 2**32 - 1, 0, 1, 2], np.uint32),
        settings=SETTINGS,
        probabilities=np.array([0.5, 0.25, np.nan, 1, 0], np.float32),
        trajectory=rng.integers(0, 256, (3, 5, 8, 8, 3)).astype(np.uint8),
    )
    return jdm.Samples(**{**values, **changes})


def test_npz_is_what_the_evaluator_of_guided_diffusion_reads(tmp_path):
    samples = samples_of()
    samples.save(tmp_path / "x.npz")
    # As that evaluator does: the header of the member arr_0.npy, then its bytes in rows.
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran, dtype) == ((5, 8, 8, 3), False, np.dtype("uint8"))
        assert member.read() == samples.images.tobytes()
    with np.load(tmp_path / "x.npz") as saved:
        for name in ("labels", "seeds", "probabilities"):
            np.testing.assert_array_equal(saved[name], getattr(samples, name))
        assert json.loads(str(saved["settings"])) == SETTINGS


@pytest.mark.parametrize("channels", [1, 3])
def test_png_shows_the_images_side_by_side(channels, tmp_path):
    samples = samples_of(images=samples_of().images[..., :channels], trajectory=None)
    samples.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width >= 400
        scale = round(picture.width / (3 * 9 - 1))  # three columns
        first = np.asarray(picture)[: 8 * scale : scale, : 8 * scale : scale]
    np.testing.assert_array_equal(first.reshape(8, 8, channels), samples.images[0])


def test_gif_goes_from_noise_to_the_images(tmp_path):
    samples = samples_of(
        trajectory=np.stack([np.full((5, 8, 8, 3), v, np.uint8) for v in (0, 128, 255)])
    )
    samples.save(tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 3
        shades = []
        for frame in range(3):
            film.seek(frame)
            shades.append(np.asarray(film.convert("L"))[0, 0])
    assert shades == [0, 128, 255]
    with pytest.raises(ValueError, match="trajectory=True"):
        samples_of(trajectory=None).save(tmp_path / "y.gif")
    assert not (tmp_path / "y.gif").exists()


def test_a_folder_holds_every_image_what_was_asked_and_how(tmp_path):
    samples = samples_of()
    samples.save(tmp_path / "x")
    with open(tmp_path / "x" / "samples.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["seed"]) for row in rows] == samples.seeds.tolist()
    assert [row["label"] for row in rows] == ["3", "4", "none", "0", "9"]
    assert [float(row["probability"]) for row in rows][:2] == [0.5, 0.25]
    for row, image in zip(rows, samples.images, strict=True):
        with Image.open(tmp_path / "x" / row["file"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), image)
    assert json.loads((tmp_path / "x" / "settings.json").read_text()) == SETTINGS
    samples_of(labels=None, probabilities=None).save(tmp_path / "y")
    assert ",7,,nan" in (tmp_path / "y" / "samples.csv").read_text()


def test_a_folder_of_other_settings_or_other_things_is_left_alone(tmp_path):
    samples_of().save(tmp_path / "x")
    samples_of(images=samples_of().images[:, ::-1]).save(tmp_path / "x")  # the same settings: again
    with Image.open(tmp_path / "x" / "000000.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), samples_of().images[0, ::-1])
    with pytest.raises(ValueError, match=r"holds samples of other settings: steps: 3 -> 4$"):
        samples_of(settings={**SETTINGS, "steps": 4}).save(tmp_path / "x")
    many = {**SETTINGS, **{f"option_{i:02}": i for i in range(13)}}
    with pytest.raises(ValueError, match=r": option_00: .*, option_09: None -> 9, and 3 more$"):
        samples_of(settings=many).save(tmp_path / "x")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which is not one of its samples"):
        samples_of().save(tmp_path / "x")
    (tmp_path / "x" / "notes.txt").rename(tmp_path / "x" / "holiday.png")
    with pytest.raises(ValueError, match=r"holds holiday.png, which is not one of its samples"):
        samples_of().save(tmp_path / "x")
    assert (tmp_path / "x" / "holiday.png").read_text() == "mine"
    for content in ("[1]", "no JSON"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "settings.json").write_text(content)
        with pytest.raises(ValueError, match="exists and holds no samples"):
            samples_of().save(tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="exists and holds no samples"):
        samples_of().save(tmp_path / "mine")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="exists and holds no samples"):
        samples_of().save(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "other", "x"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("beside", [".x.partial", ".x.before"])
def test_only_what_a_save_that_was_killed_left_is_removed_beside_a_folder(beside, tmp_path):
    samples_of().save(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / beside)  # whole, but for its name
    samples_of(images=samples_of().images[:, ::-1]).save(tmp_path / "x")
    samples_of().save(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / beside).mkdir()
    (tmp_path / beside / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match=f"{beside} is in the way, and holds no samples$"):
        samples_of().save(tmp_path / "x")
    assert (tmp_path / beside / "thesis.txt").read_text() == "all of it"


def test_what_the_system_adds_to_a_folder_of_samples_is_not_in_the_way(tmp_path):
    samples_of().save(tmp_path / "x")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "x" / name).touch()
    samples_of().save(tmp_path / "x")
    assert not (tmp_path / "x" / "Thumbs.db").exists()  # the folder was replaced


def test_samples_that_a_killed_save_put_aside_are_not_lost_to_other_settings(tmp_path):
    samples_of().save(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / ".x.before")
    with pytest.raises(ValueError, match=r"holds samples of other settings: steps: 3 -> 4$"):
        samples_of(settings={**SETTINGS, "steps": 4}).save(tmp_path / "x")
    assert len([*(tmp_path / ".x.before").glob("*.png")]) == 5


def test_where_a_link_leads_is_what_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk")
    for _ in range(2):
        samples_of().save(tmp_path / "x")
    assert (tmp_path / "x").is_symlink() and len([*(tmp_path / "disk").glob("*.png")]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "x"]


@pytest.mark.parametrize(
    ("path", "said"),
    [("/", "must name a file or a folder"), ("/proc", "is where a disk is mounted; name a folder")],
)
def test_what_cannot_be_replaced_is_refused(path, said):
    with pytest.raises(ValueError, match=f"^out='{path}' {said}"):
        samples_of().save(path)


def test_another_ending_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.npz, \.gif, or be a folder"):
        samples_of().save(tmp_path / "x.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([3, -1], np.int32), ["3", "none"]),
        (np.array([[0, 0.7, 0.3], [0, 0, 0]], np.float32), ["1:0.7+2:0.3", "none"]),
        (np.array([[1, 0, -1], [-1, -1, -1]], np.int8), ["0+!1", "none"]),
    ],
)
def test_a_notebook_shows_what_was_asked_for_and_how_sure_the_classifier_is(
    labels, words, monkeypatch
):
    shown = []
    monkeypatch.setattr(
        plot, "captioned", lambda images, words, columns: shown.append(words) or b""
    )
    probabilities = np.array([0.873, np.nan], np.float32)
    pair = dict(images=samples_of().images[:2], seeds=samples_of().seeds[:2], trajectory=None)
    samples_of(labels=labels, probabilities=probabilities, **pair)._repr_png_()
    assert shown == [[f"{words[0]} 87%", words[1]]]


def test_the_picture_in_a_notebook_holds_the_images():
    samples = samples_of()
    with Image.open(io.BytesIO(samples._repr_png_())) as picture:
        tile = np.asarray(picture)[6 : 6 + 72 : 9, 6 : 6 + 72 : 9]
    np.testing.assert_array_equal(tile, samples.images[0])
    many = samples_of(
        **{
            k: np.resize(getattr(samples, k), (101, *getattr(samples, k).shape[1:]))
            for k in ("images", "labels", "seeds", "probabilities")
        },
        trajectory=None,
    )
    with Image.open(io.BytesIO(many._repr_png_())) as picture:
        assert picture.width == (11 * 9 - 1) * 4  # without captions
