"""Pictures: uint8 arrays to grids and files. Knows no models."""

import io

import numpy as np
from jaxtyping import UInt8


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int, gap: int = 1) -> np.ndarray:
    """The images side by side, row by row, with white lines between: uint8 [H', W', C]."""
    n, h, w, c = images.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    cells = np.full((rows * columns, h + gap, w + gap, c), 255, np.uint8)
    cells[:n, :h, :w] = images
    sheet = cells.reshape(rows, columns, h + gap, w + gap, c).swapaxes(1, 2)
    return sheet.reshape(rows * (h + gap), columns * (w + gap), c)[:-gap, :-gap]


def png(picture: UInt8[np.ndarray, "h w c"], least_width: int = 480) -> bytes:
    """PNG of a grey or RGB picture, each pixel enlarged by a whole number to be seen."""
    from PIL import Image

    factor = max(1, least_width // picture.shape[1])
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return buffer.getvalue()
