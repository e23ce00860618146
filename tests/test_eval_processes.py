"""`jdm eval` in two processes: the figures of one process, and who prints and writes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jdm import distributed
from jdm.analysis import extractors, reference
from jdm.analysis.shares import in_shares
from jdm.cli.eval import _check_same
from jdm.config import config_to_dict, load_config
from jdm.convert import write_work_folder
from jdm.data.prepare import prepare
from jdm.errors import InvalidValue
from jdm.trees import digest

# Networks have random weights, and the digits are large enough for a reference network.
RANDOM = """
import jax
import numpy as np

from jdm.analysis import reference
from jdm.nn.model import make_model, weight_shapes


def random_weights(config, *_):
    shapes, rng = weight_shapes(make_model(config.model, config.exec)), np.random.default_rng(0)
    draw = lambda shape: rng.normal(0, 0.1, shape.shape).astype(shape.dtype)
    return {"batch_stats": {}, **jax.tree.map(draw, shapes)}


reference.SIDE, reference._trained = 4, random_weights
"""
EVALUATE = f"""
import sys

from jdm.cli import main
{RANDOM}
address, index, *flags = sys.argv[1:]
if index == "1":
    reference._trained = None  # process 0 has trained it
main(["eval", *flags, f"--coordinator={{address}}", "--processes=2", f"--process={{index}}"])
"""
METRICS = "classification,noise,calibration,likelihood,ood,generation"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The flags of an evaluation of a small network with all evaluators, in this folder."""
    for name in ("SIDE", "_trained"):
        monkeypatch.setattr(reference, name, None)  # and put back
    defined: dict = {}
    exec(RANDOM, defined)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (31, 8, 8), np.uint8)):
        path = tmp_path / "other" / ("train", "test")[i > 1] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    other, data = f"folder:{tmp_path / 'other'}", tmp_path / "data"
    for name in ("digits", other):
        prepare(name, str(data))
    changes = ["model.multipliers=(1,)", "model.attention=()", "eval.batch_size=64"]
    config = load_config("tiny", [f"--config.{change}" for change in changes])
    weights = defined["random_weights"](config)
    write_work_folder(tmp_path / "run", 0, weights, config_to_dict(config))
    flags = [f"--checkpoint={tmp_path / 'run'}", f"--ood={other}", f"--data_dir={data}"]
    return [*flags, f"--metrics={METRICS}", "--samples=129", "--steps=2", "--bound_steps=2"]


def read(report) -> tuple[dict, dict]:
    """(protocol, results) of a report."""
    found = json.loads((report / "report.json").read_text())
    return found["protocol"], found["results"]


def numbers(tree) -> list[float]:
    """All numbers of a result, in order."""
    if isinstance(tree, dict | list):
        return [
            x for one in (tree.values() if isinstance(tree, dict) else tree) for x in numbers(one)
        ]
    return [tree] if isinstance(tree, float) else []


def test_two_processes_give_the_figures_of_one(model, tmp_path, run, two_processes):
    two, one = tmp_path / "two", tmp_path / "one"
    zero, other = two_processes(EVALUATE, *model, f"--out={two}")
    assert (zero.returncode, other.returncode) == (0, 0), (zero, other)
    kept = sorted(path.name for path in tmp_path.glob("data/*/features-*"))
    assert len(kept) == 2
    for path in tmp_path.glob("data/*/features-*"):
        shutil.rmtree(path)
    alone = run("eval", *model, f"--out={one}")
    assert alone.returncode == 0, alone.stderr
    assert sorted(path.name for path in tmp_path.glob("data/*/features-*")) == kept

    (ours, found), (theirs, expected) = read(two), read(one)
    assert {key for key in ours if ours[key] != theirs[key]} == {"date", "device"}
    assert ours["device"] == "4 × cpu, of 2 processes"
    assert list(found) == METRICS.split(",")
    assert found["classification"]["accuracy"] == expected["classification"]["accuracy"]
    for name in expected:
        assert list(found[name]) == list(expected[name])
        np.testing.assert_allclose(numbers(found[name]), numbers(expected[name]), 1e-5, 1e-5)
    assert f"accuracy       {found['classification']['accuracy']:.4f}" in zero.stdout
    assert [line for line in other.stdout.splitlines() if "Gloo" not in line] == []


def test_each_process_computes_a_share_and_gets_all_rows(monkeypatch):
    """As processes 0, 1 and 2 of a run."""
    rows = np.random.default_rng(0).normal(size=(7, 2))
    sent: list = []
    monkeypatch.setattr(distributed, "count", lambda: 3)
    monkeypatch.setattr(distributed, "gathered", lambda x: sent.append(x) or np.stack(parts))
    parts = [rows[:3], rows[3:6], rows[4:]]
    for process in range(3):
        monkeypatch.setattr(distributed, "index", lambda process=process: process)
        found = in_shares(lambda ours: {"a": rows[ours]}, 7, shared=True)
        np.testing.assert_array_equal(found["a"], rows)
        np.testing.assert_array_equal(sent[process], parts[process])
    assert in_shares(lambda ours: rows[ours], 7, shared=False) is not None and len(sent) == 3
    assert len(in_shares(lambda ours: rows[:0][ours], 0, shared=True)) == 0 and len(sent) == 3


def test_features_that_process_0_has_kept_serve_all(tmp_path, monkeypatch):
    images, sent = np.zeros((5, 8, 8, 1), np.uint8), []
    one = extractors.Extractor("reference", "0" * 16, 2, lambda x: np.ones((len(x), 2), np.float32))
    extractors.real_features(one, images, tmp_path / "0")
    monkeypatch.setattr(distributed, "from_main", lambda x: sent.append(x) or x)
    found = extractors.real_features(one, images, tmp_path / "0", shared=True)
    monkeypatch.setattr(distributed, "from_main", lambda x: sent[0 if np.ndim(x) == 0 else 1])
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    none = one._replace(extract=None)
    np.testing.assert_array_equal(
        extractors.real_features(none, images, tmp_path / "1", shared=True), found
    )
    assert not (tmp_path / "1").exists()


def test_a_checkpoint_that_process_0_reads_otherwise_is_named(monkeypatch):
    ours, theirs = np.zeros(3), np.ones(3)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "same_as_main", lambda x: x == digest([theirs]).encode())
    _check_same("checkpoint", "runs/a", [theirs])
    with pytest.raises(InvalidValue, match="^checkpoint='runs/a' holds something else here than"):
        _check_same("checkpoint", "runs/a", [ours])
