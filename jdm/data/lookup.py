"""Finds the facts about a data set by its name: in the table, or in the user's folder."""

from jdm.data.datasets import DATASETS, Dataset
from jdm.data.folder import listing
from jdm.names import FOLDER, check_name


def dataset(name: str) -> Dataset:
    """The facts about a data set. name: a key of DATASETS, or "folder:" and a path.

    Raises InvalidValue about config.data.name for an unknown name, and as `folder.listing` does.
    """
    if not name.startswith(FOLDER):
        return DATASETS[check_name("config.data.name", name, [*DATASETS, f"{FOLDER}/path"])]
    found = listing(name.removeprefix(FOLDER))
    splits = {split: len(files) for split, files in found.files.items()}
    options: dict = dict(flips=True, splits=splits, module="jdm.data.folder_builder")
    return Dataset(name, sizes=(), channels=0, num_classes=len(found.classes), **options)
