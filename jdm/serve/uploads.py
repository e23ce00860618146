"""Pictures that visitors send: their checks, and their pixels at the model's size.

A picture comes as a data URL. Its number of bytes is checked before it is decoded, its format and
number of pixels before its pixels are.
"""

import base64
import binascii
import io
import warnings

import numpy as np
from jaxtyping import Bool, UInt8

from jdm.data.decoding import check_image, decode
from jdm.errors import NO_VALUE, InvalidValue
from jdm.serve.options import ServeOptions

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of Pillow; the others are refused unread
TAKEN = f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]} are taken"
MIB = 2**20


def refused(allowed: str) -> InvalidValue:
    return InvalidValue("The picture", NO_VALUE, allowed)


def content_of(url: str, options: ServeOptions) -> bytes:
    """The bytes of a data URL. Raises InvalidValue for anything else, and for too many."""
    head, comma, text = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise refused("did not arrive as a data URL")
    if len(text) * 3 // 4 > options.megabytes * MIB + 3:
        raise refused(
            f"has {len(text) * 0.75 / MIB:.1f} MB; at most {options.megabytes} MB are taken"
        )
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise refused("did not arrive whole") from None


def check(content: bytes, options: ServeOptions) -> None:
    """Raises InvalidValue, one sentence for the visitor, for a picture that is not taken."""
    from PIL import Image

    if not content:
        raise refused("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are counted here
            width, height = Image.open(io.BytesIO(content), formats=FORMATS).size
    except Image.DecompressionBombError:
        raise refused(
            f"has too many pixels; at most {options.megapixels} million are taken"
        ) from None
    except Exception:  # PIL has no type for "broken"
        kind = "is an SVG drawing" if b"<svg" in content[:4096].lower() else "is not an image"
        raise refused(f"{kind}; {TAKEN}") from None
    if width * height > options.megapixels * 1_000_000:
        pixels = f"has {width} × {height} = {width * height / 1e6:.0f} million pixels"
        raise refused(f"{pixels}; at most {options.megapixels} million are taken")
    if why := check_image(content):
        raise refused(f"cannot be decoded: {why}")


def pixels_of(
    url: str, shape: tuple[int, int, int], options: ServeOptions
) -> UInt8[np.ndarray, "h w c"]:
    """The picture of a data URL at the model's size, cut and resized as training images were.

    Raises InvalidValue, one sentence for the visitor.
    """
    content = content_of(url, options)
    check(content, options)
    return decode(content, shape[0], shape[2])


def region_of(
    url: str, shape: tuple[int, int, int], options: ServeOptions
) -> Bool[np.ndarray, "h w"] | None:
    """The pixels that were marked by hand: at least a quarter of each is under the brush. None for
    no mark at all, which leaves all pixels free."""
    if not url:
        return None
    marked = pixels_of(url, (*shape[:2], 1), options)[..., 0] > 63
    return marked if marked.any() else None
