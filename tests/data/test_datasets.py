import dataclasses

import pytest

from jdm.data.datasets import DATASETS, dataset


def test_every_entry_is_filed_under_its_own_name():
    assert all(dataset(name).name == name for name in DATASETS)


def test_an_unknown_name_is_one_sentence_with_the_known_ones():
    said = (
        r"^data\.name='digit' is unknown; known: digits, .* or folder:/path; did you mean digits\?$"
    )
    with pytest.raises(ValueError, match=said):
        dataset("digit")


def test_the_facts_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset("digits").channels = 3


def test_the_table_and_the_pipeline_load_no_heavy_library(start_python):
    code = """
import sys, jdm.data.datasets, jdm.data.pipeline, jdm.data.splits, jdm.data.prepare
heavy = {"jax", "tensorflow", "tensorflow_datasets", "grain", "sklearn", "PIL"}
print(sorted(heavy & set(sys.modules)))
"""
    process = start_python(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.strip() == "[]"
