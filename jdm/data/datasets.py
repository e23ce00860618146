"""The facts about every data set jdm knows, in one table.

Owns names, shapes, split sizes, downloads, and where the builder of each set lives. Reads no image
and imports nothing heavy, so that a config can be checked against it in no time.
"""

import dataclasses
import difflib
from collections.abc import Mapping

FOLDER = "folder:"  # followed by a path: a folder with a sub-folder for each class


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row of the table.

    name: what `data.name` says; that of the TFDS builder too. sizes: height = width in pixels that
    it is offered at, the first unless told otherwise; empty: any. channels: 1 or 3; 0: either.
    num_classes: labels are 0 to num_classes - 1 (-1 = unlabelled). flips: whether an image and its
    mirror image show the same. splits: images in each. carved: those of them that jdm takes out of
    the records' only split, "train", the same ones for ever. download: bytes; 0 where preparing
    downloads nothing. multi_label: whether an image has num_classes labels, each 0 or 1. module:
    the one whose import registers the builder. alone: whether it is prepared where it is needed,
    unasked. class_names: in the order of the labels, where they are known before reading.
    """

    name: str
    sizes: tuple[int, ...]
    channels: int
    num_classes: int
    flips: bool
    splits: Mapping[str, int]
    carved: tuple[str, ...] = ()
    download: int = 0
    multi_label: bool = False
    module: str = "tensorflow_datasets"
    alone: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        return self.name.startswith(FOLDER)


# Splits and downloads are those of the versions that TFDS 4.9 prepares; the downloads are the sums
# of its checksum files, which the tests compare.
DATASETS: dict[str, Dataset] = {
    entry.name: entry
    for entry in [
        Dataset(
            "digits",
            sizes=(8,),
            channels=1,
            num_classes=10,
            flips=False,
            splits={"train": 1257, "validation": 180, "test": 360},
            module="jdm.data.digits",
            alone=True,
        ),
        Dataset(
            "mnist",
            sizes=(28, 32),
            channels=1,
            num_classes=10,
            flips=False,
            splits={"train": 60_000, "test": 10_000},
            download=11_594_722,
        ),
        Dataset(
            "fashion_mnist",
            sizes=(28, 32),
            channels=1,
            num_classes=10,
            flips=True,
            splits={"train": 60_000, "test": 10_000},
            download=30_878_645,
        ),
        Dataset(
            "svhn_cropped",
            sizes=(32,),
            channels=3,
            num_classes=10,
            flips=False,
            splits={"train": 73_257, "test": 26_032, "extra": 531_131},
            download=1_575_594_780,
        ),
        Dataset(
            "cifar10",
            sizes=(32,),
            channels=3,
            num_classes=10,
            flips=True,
            splits={"train": 50_000, "test": 10_000},
            download=170_052_171,
        ),
        Dataset(
            "cifar100",
            sizes=(32,),
            channels=3,
            num_classes=100,
            flips=True,
            splits={"train": 50_000, "test": 10_000},
            download=168_513_733,
        ),
        Dataset(
            "celeb_a",
            sizes=(64, 32, 128),
            channels=3,
            num_classes=40,
            flips=True,
            splits={"train": 162_770, "validation": 19_867, "test": 19_962},
            download=1_488_628_763,
            multi_label=True,
        ),
        Dataset(
            "malaria",
            sizes=(64, 32),
            channels=3,
            num_classes=2,
            flips=True,
            splits={"train": 22_046, "validation": 2_756, "test": 2_756},
            carved=("validation", "test"),
            download=353_452_851,
        ),
    ]
}


def dataset(name: str) -> Dataset:
    """The facts about a data set: a name of the table, or "folder:" and a path.

    Raises ValueError for a name that is not in the table, and for a folder that is none of classes.
    """
    if name.startswith(FOLDER):
        from jdm.data.folder import facts

        return facts(name.removeprefix(FOLDER))
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(
            f"data.name={name!r} is unknown; known: {', '.join(DATASETS)}, or folder:/path{hint}"
        )
    return DATASETS[name]
