"""Writes crops of blood cells as a folder of images that is split by smear.

    python benchmarks/cells.py --tar=blood-cells.tar --out=cells
    jdm data prepare folder:cells
    jdm train --config=benchmarks/cells_config.py --workdir=runs/cells

The archive holds train/{red,white,platelet}/SSSSS_NN.png, where SSSSS is the smear, of the BCCD
data set (Shenggan/BCCD_Dataset, MIT licence). Cells of one smear look alike, so all of them go into
one split: a tenth of the smears is "validation", a fifth "test", by a draw with a fixed seed. A
smear has no upper side, so each training cell is written in its eight orientations.
"""

import argparse
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

SEED = 20_261_126
SHARES = {"validation": 0.1, "test": 0.2}


def smear(path: str) -> str:
    """The smear of a cell: what stands before the underscore in the name of its file."""
    return PurePosixPath(path).name.split("_")[0]


def splits(smears: list[str]) -> dict[str, str]:
    """{smear: its split}."""
    names = sorted(set(smears))
    shuffled = np.random.default_rng(SEED).permutation(names)
    counts = [round(share * len(names)) for share in SHARES.values()]
    parts = np.split(shuffled, np.cumsum(counts))
    named = zip([*SHARES, "train"], parts, strict=True)
    return {str(one): split for split, part in named for one in part}


def orientations(image: Image.Image) -> Iterator[Image.Image]:
    """The image turned by 0, 90, 180 and 270 degrees, and its mirror image likewise."""
    for one in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        yield one
        yield one.transpose(Image.Transpose.ROTATE_90)
        yield one.transpose(Image.Transpose.ROTATE_180)
        yield one.transpose(Image.Transpose.ROTATE_270)


def write_folder(tar: Path, out: Path) -> None:
    """Writes <out>/<split>/<class>/<smear>_<cell>[_<orientation>].png.

    Raises FileExistsError where `out` exists.
    """
    with tarfile.open(tar) as archive:
        out.mkdir(parents=True)
        cells = [member for member in archive.getmembers() if member.name.endswith(".png")]
        split_of = splits([smear(cell.name) for cell in cells])
        for cell in cells:
            content = archive.extractfile(cell)
            assert content is not None, cell.name
            name = PurePosixPath(cell.name)
            split = split_of[smear(cell.name)]
            folder = out / split / name.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            if split != "train":
                (folder / name.name).write_bytes(content.read())
                continue
            image = Image.open(io.BytesIO(content.read()))
            for number, turned in enumerate(orientations(image)):
                turned.save(folder / f"{name.stem}_{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tar", type=Path, required=True, help="the archive of cells")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    arguments = parser.parse_args()
    write_folder(arguments.tar, arguments.out)


if __name__ == "__main__":
    main()
