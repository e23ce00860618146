"""Draws one digit and one photograph under each policy of jdm.training.augment.

    python benchmarks/augment.py --out=docs/pictures/augment.png [--photos FILE FILE …]

Each policy is a row, with the original image at the left. The first photograph is shown; MixUp
mixes it with one of the others, and the digit with other digits.
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
    """uint8 [COLUMNS, H, W, C] for each policy: the image, then augmented versions of it."""
    pairs = [each for i in range(COLUMNS) for each in (image, others[i % len(others)])]
    batch = pixels_to_float(jnp.asarray(np.stack(pairs if len(others) else [image] * COLUMNS)))
    found = []
    for policy in POLICIES.values():
        if policy.augments:
            images = augment(policy, jax.random.key(0), batch)[0][:: len(batch) // COLUMNS]
            found.append(np.asarray(float_to_pixels(images.at[0].set(batch[0]))))
    return found


def enlarged(images: np.ndarray) -> np.ndarray:
    """RGB images of SIZE × SIZE pixels, from images whose side divides SIZE."""
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
    drawn = rows(images[labels == DIGIT][0], others)
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in arguments.photos]
    if any(photo.shape != (SIZE, SIZE, 3) for photo in photos):
        parser.error(f"--photos must be of {SIZE}×{SIZE} pixels")
    if photos:
        drawn += rows(photos[0], photos[1:])
    sheet = grid(np.concatenate([enlarged(row) for row in drawn]), columns=COLUMNS, gap=2)
    write_whole(arguments.out, png(sheet, least_width=2 * sheet.shape[1]))
    augmenting = [name for name, policy in POLICIES.items() if policy.augments]
    print(f"wrote {arguments.out}: {', '.join(augmenting)}")


if __name__ == "__main__":
    sys.exit(main())
