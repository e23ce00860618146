"""The facts about every data set that jdm knows, in one table.

Owns names, image shapes, split sizes, download sizes, and the module of each builder. Reads no
image and imports no large library, so that checking a config against it takes no time.
"""

import dataclasses
from collections.abc import Mapping

from jdm import names


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The facts about one data set.

    name: the value of config.data.name, and the name of the TFDS builder. sizes: the heights (and
    widths) in pixels that images may be decoded to, the default first; () allows any. channels: 1
    or 3; 0 allows both. num_classes: K; labels are 0 to K - 1, and -1 means unlabelled. flips:
    whether a mirrored image has the same class. splits: the number of images in each split.
    from_train: splits that jdm draws from "train", with a fixed seed, because TFDS has only that
    one. download: its size in bytes; 0 where nothing is downloaded. multi_label: whether an image
    has K labels, each 0 or 1. module: importing it registers the builder. automatic: whether the
    data set is prepared when it is first read, without a command.
    """

    name: str
    sizes: tuple[int, ...]
    channels: int
    num_classes: int
    flips: bool
    splits: Mapping[str, int]
    from_train: tuple[str, ...] = ()
    download: int = 0
    multi_label: bool = False
    module: str = "tensorflow_datasets"
    automatic: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of the user's own images instead of a row of the table."""
        return self.name.startswith(names.FOLDER)


# Splits are those of TFDS 4.9. A test compares downloads with the checksum files of TFDS.
# fmt: off
_ROWS = [
    Dataset("digits", sizes=(8,), channels=1, num_classes=10, flips=False,
            splits={"train": 1257, "validation": 180, "test": 360},
            module="jdm.data.digits", automatic=True),
    Dataset("mnist", sizes=(28, 32), channels=1, num_classes=10, flips=False,
            splits={"train": 60_000, "test": 10_000}, download=11_594_722),
    Dataset("fashion_mnist", sizes=(28, 32), channels=1, num_classes=10, flips=True,
            splits={"train": 60_000, "test": 10_000}, download=30_878_645),
    Dataset("svhn_cropped", sizes=(32,), channels=3, num_classes=10, flips=False,
            splits={"train": 73_257, "test": 26_032, "extra": 531_131}, download=1_575_594_780),
    Dataset("cifar10", sizes=(32,), channels=3, num_classes=10, flips=True,
            splits={"train": 50_000, "test": 10_000}, download=170_052_171),
    Dataset("cifar100", sizes=(32,), channels=3, num_classes=100, flips=True,
            splits={"train": 50_000, "test": 10_000}, download=168_513_733),
    Dataset("celeb_a", sizes=(64, 32, 128), channels=3, num_classes=40, flips=True,
            splits={"train": 162_770, "validation": 19_867, "test": 19_962},
            download=1_488_628_763, multi_label=True),
    Dataset("malaria", sizes=(64, 32), channels=3, num_classes=2, flips=True,
            splits={"train": 22_046, "validation": 2_756, "test": 2_756},
            from_train=("validation", "test"), download=353_452_851),
]
# fmt: on
DATASETS: dict[str, Dataset] = names.DATASETS.records({row.name: row for row in _ROWS})
