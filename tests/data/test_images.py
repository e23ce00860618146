"""Decoding to pixels, and the files that keep decoded images."""

import io

import numpy as np
import pytest
from PIL import Image

from jdm.data import DataError
from jdm.data.decoding import check_image, decode
from jdm.data.images import Selection, decoded_split


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, size=(8, 8), dtype=np.uint8)


def test_an_image_of_the_right_shape_is_unchanged():
    np.testing.assert_array_equal(decode(encoded(RGB), 8, 3), RGB)
    np.testing.assert_array_equal(decode(encoded(GREY), 8, 1)[..., 0], GREY)


def test_grey_and_colour_become_each_other():
    np.testing.assert_array_equal(decode(encoded(GREY), 8, 3), np.stack([GREY] * 3, axis=-1))
    grey = decode(encoded(RGB), 8, 1)[..., 0]
    np.testing.assert_allclose(grey, RGB @ [0.299, 0.587, 0.114], atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb(mode):
    flat = np.full((8, 8, 3), 255, np.uint8)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    np.testing.assert_array_equal(decode(encoded(flat, kind, mode), 8, 3), flat)


def test_sixteen_bits_become_eight():
    deep = (GREY.astype(np.uint16) * 257).astype(np.uint16)
    np.testing.assert_array_equal(decode(encoded(deep), 8, 1)[..., 0], GREY)


def test_an_image_is_cropped_to_the_square_in_its_middle():
    wide = np.zeros((8, 14, 3), np.uint8)
    wide[:, 3:11] = RGB
    np.testing.assert_array_equal(decode(encoded(wide), 8, 3), RGB)
    np.testing.assert_array_equal(decode(encoded(wide.swapaxes(0, 1)), 8, 3), RGB.swapaxes(0, 1))


def test_shrinking_averages():
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(decode(encoded(checkers), 8, 1).astype(int)[1:-1, 1:-1] - 127.5).max() <= 2


def test_the_orientation_in_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255
    turned = decode(encoded(halves, "JPEG", quality=95, exif=exif.tobytes()), 16, 3)
    assert turned[:7].max() < 40 and turned[9:].min() > 215
    phone = encoded(halves, "MPO", quality=95, exif=exif.tobytes(), append_images=[], save_all=True)
    np.testing.assert_array_equal(decode(phone, 16, 3), turned)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_broken_image_is_described_in_words(kind):
    whole = encoded(np.kron(RGB, np.ones((8, 8, 1), np.uint8)), kind)
    assert check_image(whole) == ""
    for broken in (whole[: len(whole) // 2], b"not an image", b""):
        said = check_image(broken)
        assert said and "\n" not in said and "0x" not in said


class Listed(list):
    """Records in memory."""

    path = "somewhere"


def records(count: int) -> Listed:
    images = RNG.integers(0, 256, size=(count, 8, 8, 3), dtype=np.uint8)
    listed = Listed({"image": encoded(x), "label": np.int32(i)} for i, x in enumerate(images))
    listed.images = images
    return listed


def test_images_are_decoded_once_and_mapped_read_only(tmp_path):
    some = records(10)
    images, labels = decoded_split(tmp_path / "kept", some, 8, 3)
    np.testing.assert_array_equal(images, some.images)
    assert labels.tolist() == list(range(10)) and labels.dtype == np.int32
    assert isinstance(images, np.memmap) and not images.flags.writeable
    again, _ = decoded_split(tmp_path / "kept", Listed([None] * 10), 8, 3)  # nothing to decode
    np.testing.assert_array_equal(again, some.images)


def test_a_broken_record_is_named_and_leaves_no_file(tmp_path):
    some = records(10)
    some[7]["image"] = some[7]["image"][:60]
    with pytest.raises(DataError, match="^somewhere: image 7 cannot be decoded"):
        decoded_split(tmp_path / "kept", some, 8, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"MiB, but .*; config\.data\.cache_dir chooses another"):
        decoded_split(tmp_path / "kept", records(3), 10**8, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_damaged(tmp_path):
    decoded_split(tmp_path / "kept", records(10), 8, 3)
    path = tmp_path / "kept" / "images.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"images\.npy is damaged .* delete "):
        decoded_split(tmp_path / "kept", records(10), 8, 3)


def test_a_selection_of_several_arrays_is_one_array():
    one, two = (np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1) for n in (10, 5))
    selection = Selection([(one, np.array([9, 0, 4])), (two, np.array([1, 1]))])
    whole = np.concatenate([one[[9, 0, 4]], two[[1, 1]]])
    assert selection.shape == whole.shape and len(selection) == 5
    rows = np.array([4, 0, 2, 2, 3, 1])
    np.testing.assert_array_equal(selection[rows], whole[rows])
