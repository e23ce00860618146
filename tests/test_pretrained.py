"""The packaged model: it loads by its name, is what the script exports, and performs well."""

import configparser
import contextlib
import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import jdm
from jdm import checkpoint, cli
from jdm.config import config_from_dict, load_config
from jdm.data.identity import differences, identity
from jdm.data.splits import ReadOptions, load_split
from jdm.pretrained import PRETRAINED

ROOT = Path(__file__).parent.parent
FOLDER = PRETRAINED["digits"]


@pytest.fixture(scope="module")
def joint():
    return jdm.load("digits")


@pytest.fixture
def script(monkeypatch):
    """benchmarks/pretrained.py, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "pretrained", raising=False)
    return importlib.import_module("pretrained")


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def test_the_names_are_those_of_the_folders():
    folders = {
        path.name: path for path in FOLDER.parent.iterdir() if (path / "checkpoints").exists()
    }
    assert folders == PRETRAINED


def test_it_is_small_undamaged_and_has_weights_and_config_only():
    assert sum(path.stat().st_size for path in files(FOLDER).values()) < 3_000_000
    (step,) = checkpoint.steps(FOLDER)
    checkpoint.verify(FOLDER, step)
    assert checkpoint.items(FOLDER, step) == {"weights", "config", "data"}


def test_the_wheel_has_all_of_its_files():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["jdm.pretrained"].split()
    packed = {path for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert packed >= set(files(FOLDER).values())


def test_the_config_is_that_of_the_script(script):
    (step,) = checkpoint.steps(FOLDER)
    stored = config_from_dict(checkpoint.read_config(FOLDER, step))
    assert stored == load_config("digits", script.OVERRIDES)
    assert step == stored.train.steps


def paths_within(folder):
    """The absolute paths in its text files."""
    found = []
    for name, path in files(folder).items():
        with contextlib.suppress(UnicodeDecodeError):
            found += [f"{name}: {at}" for at in re.findall(r"(?<![\w.])/\w+/\S*", path.read_text())]
    return found


def test_its_files_contain_no_path_of_a_machine():
    assert paths_within(FOLDER) == []


def test_weights_are_the_stored_ones_in_float32(joint):
    assert {x.dtype for x in jax.tree.leaves(joint.weights)} == {np.dtype(np.float32)}
    (step,) = checkpoint.steps(FOLDER)
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float16, sharding=x.sharding), joint.weights
    )
    stored = checkpoint.restore(FOLDER, step, weights=half)["weights"]
    chex.assert_trees_all_equal(joint.weights, jax.tree.map(np.float32, stored))


def test_it_knows_its_classes_and_the_data_it_was_trained_on(joint):
    assert joint.class_names == tuple("0123456789")
    assert differences(joint.dataset, identity("digits", ReadOptions())) == []


def test_accuracy(joint):
    images, labels = load_split("digits", "test")
    assert np.mean(jdm.classify(joint, images).argmax(axis=1) == labels) >= 0.97


@pytest.mark.parametrize("command", ["sample", "eval", "convert"])
def test_the_help_names_it(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "packaged model: digits" in " ".join(capsys.readouterr().out.split())


def test_a_damaged_copy_is_not_loaded(tmp_path):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    largest = max(files(copy).values(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"{largest.name} is damaged"):
        jdm.load(copy)


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="digit/checkpoints.*models: digits$"):
        jdm.load("digit")


def test_a_path_means_the_folder_not_the_packaged_model(tiny, joint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny, "digits")
    for path in ("./digits", Path("digits"), f"{tmp_path}/digits"):
        assert jdm.load(path).model.channels == 8
    with pytest.warns(UserWarning, match="is the packaged model.*'./digits'"):
        assert jdm.load("digits").model == joint.model


def test_export_replaces_a_folder_by_the_ema_weights_in_half_precision(script, tiny, tmp_path):
    (tmp_path / "half" / "checkpoints" / "3").mkdir(parents=True)
    script.export(tiny, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    assert checkpoint.steps(tmp_path / "half") == [4]
    assert paths_within(tmp_path / "half") == []
    whole, half = jdm.load(tiny), jdm.load(tmp_path / "half")
    assert half.config == whole.config
    rounded = jax.tree.map(lambda x: np.float32(np.float16(x)), whole.weights)
    chex.assert_trees_all_equal(half.weights, rounded)


def test_its_counterfactuals_move_toward_the_target_and_the_control_does_not(joint):
    images = load_split("digits", "test").images[:4]
    targets = (jdm.classify(joint, images).argmax(axis=1) + 3) % 10
    given = dict(strengths=(0.6,), draws=1, steps=10, again=0.0, confidence=0.5, batch_size=4)
    found = jdm.explain(joint, images, targets.tolist(), **given)
    assert found.valid.sum() >= 3
    assert found.of_target(found.probabilities_control)[found.valid].mean() < 0.3
    away = jdm.explain(joint, images, targets.tolist(), scale=-6.0, **given)
    assert away.valid.sum() == 0
