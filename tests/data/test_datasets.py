import dataclasses

import pytest

from jdm.data.datasets import DATASETS, available, dataset


def test_every_entry_is_filed_under_its_own_name():
    assert all(dataset(name).name == name for name in DATASETS)


def test_an_unknown_name_is_one_sentence_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^data\.name is 'digit', but must be one of digits, c"):
        dataset("digit")


def test_a_dataset_without_a_builder_is_one_sentence_with_those_that_have_one():
    assert available("digits") is dataset("digits")
    message = r"^data\.name='cifar10' is not available yet; available: digits$"
    with pytest.raises(ValueError, match=message):
        available("cifar10")


def test_the_facts_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset("digits").image_size = 28


def test_the_table_and_the_pipeline_load_no_heavy_library(start_python):
    code = """
import sys, jdm.data.datasets, jdm.data.pipeline
heavy = {"jax", "tensorflow", "tensorflow_datasets", "grain", "sklearn", "PIL"}
print(sorted(heavy & set(sys.modules)))
"""
    process = start_python(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.strip() == "[]"
