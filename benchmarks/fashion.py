"""Writes the original files of Fashion-MNIST as a folder of images: 28×28, without TensorFlow.

    python benchmarks/fashion.py --idx=fashion-mnist --out=fashion
    jdm data prepare folder:fashion
    jdm train --config=mnist --config.data.name=folder:fashion --workdir=runs/fashion

The files are {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz of zalandoresearch/fashion-mnist (MIT
licence), 60,000 images to train on and 10,000 to test.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from mnist5k import Splits, write_folder

FILES = {"train": "train", "test": "t10k"}
CLASSES = "top trouser pullover dress coat sandal shirt sneaker bag boot".split()
IMAGES_HEADER, LABELS_HEADER = 16, 8  # bytes before the values of an IDX file


def fashion(folder: Path) -> Splits:
    """{split: (images, labels)} of the IDX files in the folder."""

    def values(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    return {
        split: (
            values(f"{name}-images-idx3-ubyte.gz", IMAGES_HEADER).reshape(-1, 28, 28, 1),
            values(f"{name}-labels-idx1-ubyte.gz", LABELS_HEADER).astype(np.int32),
        )
        for split, name in FILES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, required=True, help="the folder of the IDX files")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    arguments = parser.parse_args()
    write_folder(arguments.out, fashion(arguments.idx), CLASSES)


if __name__ == "__main__":
    main()
