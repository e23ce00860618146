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
    flips: whether an image and its mirror image show the same. module: the module whose import
    registers the dataset's builder with TFDS.
    """

    name: str
    image_size: int
    channels: int
    num_classes: int
    flips: bool
    splits: Mapping[str, int]
    module: str


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
    ]
}


def dataset(name: str) -> Dataset:
    """The facts about the dataset `name`; ValueError if it is not in the table."""
    if name not in DATASETS:
        raise ValueError(f"data.name is {name!r}, but must be one of {', '.join(DATASETS)}.")
    return DATASETS[name]
