"""Writes crops of blood cells as a folder of images that is split by smear.

    python benchmarks/cells.py --tar=blood-cells.tar --out=cells
    jdm data prepare folder:cells
    jdm train --config=benchmarks/cells_config.py --workdir=runs/cells

The archive holds train/{red,white,platelet}/SSSSS_NN.png, where SSSSS is the smear, of the BCCD
data set (Shenggan/BCCD_Dataset, MIT licence). Cells of one smear look alike, so all of them go into
one split: a tenth of the smears is "validation", a fifth "test", by a draw with a fixed seed.
"""

import argparse
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

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


def write_folder(tar: Path, out: Path) -> None:
    """Writes <out>/<split>/<class>/<file>. Raises FileExistsError where `out` exists."""
    out.mkdir(parents=True)
    with tarfile.open(tar) as archive:
        cells = [member for member in archive.getmembers() if member.name.endswith(".png")]
        split_of = splits([smear(cell.name) for cell in cells])
        for cell in cells:
            content = archive.extractfile(cell)
            assert content is not None, cell.name
            name = PurePosixPath(cell.name)
            path = out / split_of[smear(cell.name)] / name.parent.name / name.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tar", type=Path, required=True, help="the archive of cells")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    arguments = parser.parse_args()
    write_folder(arguments.tar, arguments.out)


if __name__ == "__main__":
    main()
