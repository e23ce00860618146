import io

import numpy as np
from PIL import Image

from jdm import plot


def test_grid_places_images_row_by_row():
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 2, 2, 1), np.uint8)
    sheet = plot.grid(images, columns=2)
    assert sheet.shape == (5, 5, 1)
    assert (sheet[:2, :2] == 0).all() and (sheet[:2, 3:] == 1).all() and (sheet[3:, :2] == 2).all()
    assert (sheet[2] == 255).all() and (sheet[3:, 3:] == 255).all()  # the gap, the empty cell


def test_png_round_trip_grey_and_rgb():
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        picture = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
        image = np.atleast_3d(np.asarray(Image.open(io.BytesIO(plot.png(picture, 70)))))
        assert image.shape == (50, 70, channels)
        np.testing.assert_array_equal(image[::10, ::10], picture)


def test_by_class_has_a_column_for_each_class():
    labels = np.array([2, 0, 2, -1, 0, 2])
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) + 10
    picture, caption = plot.by_class(images, labels, rows=2)
    assert picture[::2, ::2, 0].tolist() == [[11, 10], [14, 12]]
    assert caption == "up to 2 images of each of 2 classes"
    several, caption = plot.by_class(images, np.stack([labels] * 2, axis=1), rows=2)
    assert several[::2, ::2, 0].tolist() == [[10, 11], [12, 13]] and caption == "the first 4 images"
