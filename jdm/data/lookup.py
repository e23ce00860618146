"""Finds the facts about a data set by its name: in the table, or in the user's folder."""

from jdm.data import folder
from jdm.data.datasets import DATASETS, Dataset
from jdm.names import FOLDER, check_name


def dataset(name: str) -> Dataset:
    """The facts about a data set. name: a key of DATASETS, or "folder:" and a path.

    Raises InvalidValue about config.data.name for an unknown name, and as `folder.listing` does.
    """
    if name.startswith(FOLDER):
        return folder.facts(name.removeprefix(FOLDER))
    return DATASETS[check_name("config.data.name", name, [*DATASETS, f"{FOLDER}/path"])]
