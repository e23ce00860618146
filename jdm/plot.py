"""Pictures: grids of uint8 images, and their files. Knows no models."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int, gap: int = 1) -> np.ndarray:
    """The images in rows of `columns`, with white lines of `gap` pixels: uint8 [H', W', C]."""
    n, h, w, c = images.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    cells = np.full((rows * columns, h + gap, w + gap, c), 255, np.uint8)
    cells[:n, :h, :w] = images
    sheet = cells.reshape(rows, columns, h + gap, w + gap, c).swapaxes(1, 2)
    return sheet.reshape(rows * (h + gap), columns * (w + gap), c)[:-gap, :-gap]


def by_class(
    images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, "n ..."], rows: int
) -> tuple[np.ndarray, str]:
    """(a picture with one column for each class, which shows its first images; what it shows).

    Of images with several labels each, a square of the first images.
    """
    if labels.ndim > 1:
        first = images[: rows * rows]
        return grid(first, columns=rows), f"the first {len(first)} images"
    classes = np.unique(labels[labels >= 0])[:20]
    sheet = np.full((rows, len(classes), *images.shape[1:]), 255, np.uint8)
    for column, label in enumerate(classes):
        found = images[np.flatnonzero(labels == label)[:rows]]
        sheet[: len(found), column] = found
    picture = grid(sheet.reshape(-1, *images.shape[1:]), columns=len(classes))
    return picture, f"up to {rows} images of each of {len(classes)} classes"


def gif(pictures: Sequence[UInt8[np.ndarray, "h w c"]], least_width: int = 480) -> bytes:
    """An animated GIF of pictures of one size; 0.1 s each, the last one 2 s."""
    first, *others = (_enlarged(picture, least_width) for picture in pictures)
    durations = [100] * len(others) + [2000]  # milliseconds
    return _encoded(first, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def png(picture: UInt8[np.ndarray, "h w c"], least_width: int = 480) -> bytes:
    """PNG of a grey or RGB picture, enlarged as far as it stays within `least_width` pixels."""
    return _encoded(_enlarged(picture, least_width), "PNG")


def captioned(images: UInt8[np.ndarray, "n h w c"], captions: Sequence[str], columns: int) -> bytes:
    """PNG of a grid of enlarged images, each with a line of text below it."""
    least_width, line, gap, most = 72, 14, 6, 200  # pixels
    tiles = [_enlarged(image, least_width) for image in images]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    captions = [_fitting(caption, measure, most) for caption in captions]
    widest = max(map(measure.textlength, captions))
    cell = max(tiles[0].width, int(np.ceil(widest)))
    wide, high = cell + gap, tiles[0].height + line + gap
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide + gap, rows * high + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        center, top = gap + i % columns * wide + cell / 2, gap + i // columns * high
        sheet.paste(tile.convert("RGB"), (int(center - tile.width / 2), top))
        draw.text((center, top + tile.height + line / 2), caption, fill="black", anchor="mm")
    return _encoded(sheet, "PNG")


def _fitting(text: str, draw: ImageDraw.ImageDraw, width: int) -> str:
    """The text; where it is wider than `width` pixels, without what is in its middle."""
    left = text
    while draw.textlength(text) > width:
        left = left[: len(left) // 2] + left[len(left) // 2 + 1 :]
        text = f"{left[: len(left) // 2]}…{left[len(left) // 2 :]}"
    return text


def _enlarged(picture: UInt8[np.ndarray, "h w c"], least_width: int) -> Image.Image:
    """The picture for PIL, each pixel drawn as a square of a whole number of pixels."""
    factor = max(1, least_width // picture.shape[1])
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
