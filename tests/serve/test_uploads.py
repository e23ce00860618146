"""What visitors send: each hostile picture is refused by one sentence, before its pixels exist."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from jdm.errors import InvalidValue
from jdm.serve import uploads
from jdm.serve.options import ServeOptions

OPTIONS = ServeOptions(megabytes=1, megapixels=1)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("svg", "The picture is an SVG drawing; PNG, JPEG, WEBP, GIF and BMP are taken"),
        ("text", "The picture is not an image; PNG"),
        ("empty", "The picture is empty"),
        ("large", "has 1500 × 1500 = 2 million pixels; at most 1 million are taken"),
        ("bomb", "too many pixels; at most 1 million are taken"),
        ("cut", "The picture cannot be decoded: "),
        ("bytes", "has 9.0 MB; at most 1 MB are taken"),
    ],
)
def test_hostile_pictures_are_refused_by_one_sentence(hostile, name, said, monkeypatch):
    if name in ("large", "bomb", "bytes"):
        monkeypatch.setattr(uploads, "check_image", lambda content: pytest.fail("was decoded"))
    with pytest.raises(InvalidValue) as caught:
        uploads.pixels_of(url(hostile[name]), (8, 8, 1), OPTIONS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "https://example.org/a.png", "data:image/png,abc", "/etc/x"])
def test_nothing_but_a_data_url_is_read(text):
    with pytest.raises(InvalidValue, match="did not arrive as a data URL"):
        uploads.pixels_of(text, (8, 8, 1), OPTIONS)


def test_base64_that_is_cut_is_refused():
    with pytest.raises(InvalidValue, match="did not arrive whole"):
        uploads.pixels_of("data:;base64,abc", (8, 8, 1), OPTIONS)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_gets_the_size_of_the_model(channels):
    found = uploads.pixels_of(url(png(np.full((20, 30), 200, np.uint8))), (8, 8, channels), OPTIONS)
    assert found.shape == (8, 8, channels) and (found == 200).all()


def test_a_region_is_what_is_marked():
    marks = np.zeros((32, 32), np.uint8)
    marks[:16, 16:] = 255
    region = uploads.region_of(url(png(marks)), (8, 8, 3), OPTIONS)
    assert region.shape == (8, 8) and region[:4, 4:].all() and region.sum() == 16
    assert uploads.region_of("", (8, 8, 3), OPTIONS) is None
    assert uploads.region_of(url(png(0 * marks)), (8, 8, 3), OPTIONS) is None
