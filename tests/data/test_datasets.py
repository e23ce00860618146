import dataclasses

import pytest

from jdm import names
from jdm.data.datasets import DATASETS
from jdm.data.lookup import dataset


def test_every_name_has_its_entry():
    assert tuple(dataset(name).name for name in names.DATASETS) == names.DATASETS == tuple(DATASETS)


def test_an_unknown_name_is_one_sentence_with_the_known_ones():
    said = (
        r"^config\.data\.name='digit' is unknown; known: digits, .*, folder:/path; "
        r"did you mean digits\?$"
    )
    with pytest.raises(ValueError, match=said):
        dataset("digit")


def test_the_facts_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset("digits").channels = 3


def test_no_heavy_library_is_imported_before_it_is_needed(start_python):
    code = """
import sys, jdm.data.fit, jdm.data.pipeline, jdm.data.prepare
heavy = {"jax", "tensorflow", "tensorflow_datasets", "grain", "sklearn", "PIL"}
print(sorted(heavy & set(sys.modules)))
"""
    process = start_python(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.strip() == "[]"
