"""Every recipe of docs/extending.md, followed to the letter in a copy of the package, and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()

# One process, since a start takes seconds; each call is what the command `jdm` does.
RUN = """
import jdm
from jdm.cli import main

assert jdm.__file__.startswith({folder!r})  # a checkout is a package too
jdm.load("digits")
for argv in {commands!r}:
    main(argv)
"""


def follow(folder: Path) -> None:
    """Writes the files of the page and makes its changes in a copy of the package."""
    shutil.copytree(ROOT / "jdm", folder / "jdm", ignore=shutil.ignore_patterns("__pycache__"))
    for block in re.findall(r"```python\n(# jdm/.*?)```", PAGE, flags=re.S):
        path = folder / block.splitlines()[0].removeprefix("# ")
        assert not path.exists()
        path.write_text(block)
    for name, changes in re.findall(r"```diff\n(jdm/\S+)\n(.*?)```", PAGE, flags=re.S):
        lines = changes.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in "- ")
        after = "".join(line[1:] for line in lines if line[0] in "+ ")
        path = folder / name
        text = path.read_text()
        assert text.count(before) == 1, before
        path.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder in which every recipe was run through the command line."""
    folder = tmp_path_factory.mktemp("extended")
    follow(folder)
    train = ["train", "--config=tiny", "--workdir=run", "--config.train.steps=2"]
    train += ["--config.data.name=stripes", "--config.model.num_classes=2"]
    train += ["--config.data.validation=0.25", "--config.model.head=linear"]
    train += ["--config.model.multipliers=(1,)", "--config.model.attention=()"]  # compiled sooner
    train += ["--config.loss.terms=diffusion,classifier,small_logits"]
    train += ["--config.eval.metrics=classification,confidence"]
    sample = ["sample", "--checkpoint=run", "--sampler=euler", "--guidance=unit", "--steps=3"]
    sample += ["--labels=0,1", "--seeds=0-3", "--out=samples.npz"]
    evaluate = ["eval", "--checkpoint=run", "--metrics=confidence", "--out=report"]
    code = RUN.format(folder=str(folder), commands=[train, sample, evaluate])
    environment = {**os.environ, "TFDS_DATA_DIR": str(folder / "data"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_data_set_a_head_a_term_and_an_evaluator_are_trained_with(ran):
    rows = [json.loads(line) for line in (ran / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["train/squared_logits"] > 0
    assert 0.5 <= rows[-1]["eval/confidence"] <= 1 and "eval/accuracy" in rows[-1]


def test_a_sampler_and_a_guidance_are_sampled_with(ran):
    with np.load(ran / "samples.npz") as saved:
        assert saved["arr_0"].shape == (4, 8, 8, 1)
        settings = json.loads(str(saved["settings"]))
    assert (settings["sampler"], settings["guidance"], settings["scale"]) == ("euler", "unit", 2.0)


def test_an_evaluator_is_run_on_its_own(ran):
    report = json.loads((ran / "report" / "report.json").read_text())
    assert 0.5 <= report["results"]["confidence"]["confidence"] <= 1
    assert list(report["results"]) == ["confidence"]
    assert report["protocol"]["data"] == "stripes" and report["protocol"]["images"] == 32
