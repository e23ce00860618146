"""Pictures: uint8 arrays to grids and files. Knows no models."""

import io

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


def png(picture: UInt8[np.ndarray, "h w c"], least_width: int = 480) -> bytes:
    """PNG of a grey or RGB picture, each pixel enlarged by a whole number to be seen."""
    from PIL import Image

    factor = max(1, least_width // picture.shape[1])
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return buffer.getvalue()
