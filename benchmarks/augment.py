"""What the policies of jdm.training.augment make of one digit, and of one photograph.

    python benchmarks/augment.py --out=docs/pictures/augment.png [--photos FILE FILE …]

A row for each policy, with the image as it is at its left. The first photograph is shown; MixUp
finds its partners among the others, as it does among other digits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jdm.data.digits import digits
from jdm.diffusion.process import float_to_pixels, pixels_to_float
from jdm.files import write_whole
from jdm.plot import grid, png
from jdm.training.augment import POLICIES, augment

COLUMNS, SIZE, DIGIT = 16, 32, 3


def rows(image: np.ndarray, others: Sequence[np.ndarray]) -> list[np.ndarray]:
    """uint8 [COLUMNS, H, W, C] for each policy: the image, then what becomes of it."""
    batch = pixels_to_float(jnp.asarray(np.stack([image] * COLUMNS + [*others])))
    made = []
    for name, policy in POLICIES.items():
        if name != "none":
            images = augment(policy, jax.random.key(0), batch)[0][:COLUMNS]
            made.append(np.asarray(float_to_pixels(images.at[0].set(batch[0]))))
    return made


def enlarged(images: np.ndarray) -> np.ndarray:
    """RGB images of SIZE × SIZE, of images whose side divides it."""
    factor = SIZE // images.shape[1]
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.broadcast_to(images, (*images.shape[:3], 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path, nargs="+", default=[], help=f"of {SIZE}×{SIZE}")
    arguments = parser.parse_args()

    images, labels = digits()
    others = images[labels != DIGIT][:COLUMNS]
    made = rows(images[labels == DIGIT][0], others)
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in arguments.photos]
    if any(photo.shape != (SIZE, SIZE, 3) for photo in photos):
        parser.error(f"--photos must be of {SIZE}×{SIZE} pixels")
    if photos:
        made += rows(photos[0], photos[1:])
    sheet = grid(np.concatenate([enlarged(row) for row in made]), columns=COLUMNS, gap=2)
    write_whole(arguments.out, png(sheet, least_width=2 * sheet.shape[1]))
    print(f"wrote {arguments.out}: {', '.join(name for name in POLICIES if name != 'none')}")


if __name__ == "__main__":
    sys.exit(main())
