"""Pictures: uint8 arrays to grids and files. Knows no models."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int, gap: int = 1) -> np.ndarray:
    """The images side by side, row by row, with white lines between: uint8 [H', W', C]."""
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
    """(the first images of each class in a column of its own, what the picture holds).

    Of several labels to an image, a square of the first images.
    """
    if labels.ndim > 1:
        some = images[: rows * rows]
        return grid(some, columns=rows), f"the first {len(some)} images"
    classes = np.unique(labels[labels >= 0])[:20]
    sheet = np.full((rows, len(classes), *images.shape[1:]), 255, np.uint8)
    for column, one in enumerate(classes):
        found = images[np.flatnonzero(labels == one)[:rows]]
        sheet[: len(found), column] = found
    picture = grid(sheet.reshape(-1, *images.shape[1:]), columns=len(classes))
    return picture, f"up to {rows} images of each of {len(classes)} classes"


def gif(pictures: Sequence[UInt8[np.ndarray, "h w c"]], least_width: int = 480) -> bytes:
    """An animated GIF of pictures of one size, which stands still at the last for a while."""
    frames = [_enlarged(picture, least_width) for picture in pictures]
    buffer = io.BytesIO()
    durations = [100] * (len(frames) - 1) + [2000]  # milliseconds
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return buffer.getvalue()


def png(picture: UInt8[np.ndarray, "h w c"], least_width: int = 480) -> bytes:
    """PNG of a grey or RGB picture, each pixel enlarged by a whole number to be seen."""
    buffer = io.BytesIO()
    _enlarged(picture, least_width).save(buffer, "PNG")
    return buffer.getvalue()


def captioned(images: UInt8[np.ndarray, "n h w c"], captions: Sequence[str], columns: int) -> bytes:
    """PNG of a grid of enlarged images, each with a line of text below it."""
    from PIL import Image, ImageDraw

    least, line, gap = 72, 14, 6
    tiles = [_enlarged(image, least) for image in images]
    wide, high = tiles[0].width + gap, tiles[0].height + line + gap
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide + gap, rows * high + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = gap + i % columns * wide, gap + i // columns * high
        sheet.paste(tile.convert("RGB"), (left, top))
        place = (left + tile.width / 2, top + tile.height + line / 2)
        draw.text(place, caption, fill="black", anchor="mm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _enlarged(picture: UInt8[np.ndarray, "h w c"], least_width: int):
    """The picture for PIL, each pixel a square."""
    from PIL import Image

    factor = max(1, least_width // picture.shape[1])
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
