"""The packaged model: that it loads by its name, is what the script makes, and is any good."""

import configparser
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jdm
from jdm import checkpoint, flags
from jdm import config as configs
from jdm.analysis import metrics
from jdm.data.splits import load_split
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


def test_every_packaged_model_is_there_and_every_folder_is_named():
    folders = {
        path.name: path for path in FOLDER.parent.iterdir() if (path / "checkpoints").exists()
    }
    assert folders == PRETRAINED


def test_it_is_small_whole_and_holds_weights_and_config_alone():
    assert sum(path.stat().st_size for path in files(FOLDER).values()) < 3_000_000
    (step,) = checkpoint.steps(FOLDER)
    checkpoint.verify(FOLDER, step)
    assert checkpoint.items(FOLDER, step) == {"weights", "config"}


def test_the_wheel_holds_all_of_it():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "jdm.pretrained" in setup["options"]["packages"].split()
    patterns = setup["options.package_data"]["jdm.pretrained"].split()
    packed = {path for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert packed >= set(files(FOLDER).values())


def test_the_config_is_that_of_the_script(script):
    (step,) = checkpoint.steps(FOLDER)
    inside = configs.from_dict(checkpoint.read_config(FOLDER, step))
    assert inside.to_dict() == configs.load("digits", list(script.OVERRIDES)).to_dict()
    assert step == inside.train.steps


def paths_within(folder):
    """The absolute paths in its text files."""
    found = []
    for name, path in files(folder).items():
        with contextlib.suppress(UnicodeDecodeError):
            found += [f"{name}: {at}" for at in re.findall(r"(?<![\w.])/\w+/\S*", path.read_text())]
    return found


def test_it_tells_nothing_of_the_machine_it_was_made_on():
    assert paths_within(FOLDER) == []


def test_weights_are_float32_and_those_that_were_stored(joint):
    assert {x.dtype for x in jax.tree.leaves(joint.weights)} == {np.dtype(np.float32)}
    (step,) = checkpoint.steps(FOLDER)
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float16, sharding=x.sharding), joint.weights
    )
    stored = checkpoint.restore(FOLDER, step, weights=half)["weights"]
    jax.tree.map(np.testing.assert_array_equal, joint.weights, stored)


def test_accuracy(joint):
    images, labels = load_split("digits", "test")
    assert np.mean(jdm.classify(joint, images).argmax(axis=1) == labels) >= 0.97


def test_from_the_command_line_it_draws_what_it_is_asked_for(optimised, tmp_path):
    out = tmp_path / "samples.npz"
    command = [Path(sys.executable).with_name("jdm"), "sample", "--checkpoint=digits"]
    command += ["--seeds=2000000-2000049", "--labels=0,1,2,3,4,5,6,7,8,9", "--guidance=pixel"]
    command += ["--sampler=ancestral", "--steps=10", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=optimised)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    with np.load(out) as saved:
        images, labels = saved["arr_0"], saved["labels"]
    judged = metrics.class_agreement(*load_split("digits", "train"), images, labels)
    assert min(judged.values()) >= 0.8


def test_help_names_it():
    for command in ("sample", "eval", "convert"):
        group = flags.parser({})._subparsers._group_actions[0].choices[command]
        assert "digits" in group._option_string_actions["--checkpoint"].help


def test_a_damaged_one_is_refused(tmp_path):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    largest = max(files(copy).values(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"{largest.name} is damaged"):
        jdm.load(copy)


def test_an_unknown_name_is_told_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="digit/checkpoints.*models: digits$"):
        jdm.load("digit")


def test_a_folder_of_the_same_name_is_meant_by_a_path(tiny, joint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny, "digits")
    for path in ("./digits", Path("digits"), f"{tmp_path}/digits"):
        assert jdm.load(path).model.channels == 8
    with pytest.warns(UserWarning, match="is the packaged model.*'./digits'"):
        assert jdm.load("digits").model == joint.model


def test_export_replaces_a_folder_by_the_averages_in_half_precision(script, tiny, tmp_path):
    (tmp_path / "half" / "checkpoints" / "3").mkdir(parents=True)
    script.export(tiny, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    assert checkpoint.steps(tmp_path / "half") == [4]
    assert paths_within(tmp_path / "half") == []
    whole, half = jdm.load(tiny), jdm.load(tmp_path / "half")
    assert half.config == whole.config
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.float16(a), b), whole.weights, half.weights
    )
