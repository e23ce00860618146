"""The facts about every dataset jdm knows, in one table.

Owns names, shapes, split sizes and where the builder of each dataset lives. Reads no data, and
imports nothing, so that a config can be checked against it in no time.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row of the table.

    name: what `data.name` says. image_size: height = width, in pixels. channels: 1 or 3.
    num_classes: labels are 0 to num_classes - 1 (-1 = unlabelled). splits: images in each split.
    multi_label: whether an image has num_classes labels, each 0 or 1, int8 [num_classes]. flips:
    whether an image and its mirror image show the same. module: the module whose import registers
    the dataset's builder with TFDS; "" where there is none yet, so that a config can be built and
    its network compiled, but not trained.
    """

    name: str
    image_size: int
    channels: int
    num_classes: int
    flips: bool
    splits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    module: str = ""
    multi_label: bool = False


DATASETS: dict[str, Dataset] = {
    entry.name: entry
    for entry in [
        Dataset(
            name="digits",
            image_size=8,
            channels=1,
            num_classes=10,
            flips=False,
            splits={"train": 1257, "validation": 180, "test": 360},
            module="jdm.data.digits",
        ),
        Dataset("cifar10", image_size=32, channels=3, num_classes=10, flips=True),
        Dataset("cifar100", image_size=32, channels=3, num_classes=100, flips=True),
        Dataset("svhn", image_size=32, channels=3, num_classes=10, flips=False),
        Dataset("fashion_mnist", image_size=28, channels=1, num_classes=10, flips=True),
        Dataset("celeba", image_size=64, channels=3, num_classes=40, flips=True, multi_label=True),
        Dataset("malaria", image_size=64, channels=3, num_classes=2, flips=True),
    ]
}


def dataset(name: str) -> Dataset:
    """The facts about the dataset `name`; ValueError if it is not in the table."""
    if name not in DATASETS:
        raise ValueError(f"data.name is {name!r}, but must be one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def available(name: str) -> Dataset:
    """The facts about a dataset whose images can be had; ValueError if it is not one of them."""
    entry = dataset(name)
    if not entry.module:
        known = ", ".join(entry.name for entry in DATASETS.values() if entry.module)
        raise ValueError(f"data.name={name!r} is not available yet; available: {known}")
    return entry
