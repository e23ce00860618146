"""Trains the packaged digits model, jdm.load("digits"), and exports the EMA of its weights.

    python benchmarks/pretrained.py --workdir=runs/pretrained --write

writes jdm/pretrained/digits, a work folder with one checkpoint: weights in half precision, the
config, and what the data was. Then it prints the metrics of that model. Without --write the folder
is <workdir>/half, and --steps sets another number of training steps. 1,200 (of the config) and
2,400 were compared, with one run each, and 2,400 was chosen (docs/results.md). No other setting was
tuned.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from digits import GUIDANCE, score

import jdm
from jdm import checkpoint, startup, trainer
from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.config import config_to_dict, load_config
from jdm.convert import write_work_folder
from jdm.data.splits import load_split
from jdm.errors import InvalidValue
from jdm.files import whole_folder
from jdm.pretrained import PRETRAINED

OVERRIDES = ("--config.seed=0", "--config.train.steps=2400")
SEEDS = range(2_000_000, 2_000_500)


def export(workdir: str | os.PathLike, folder: Path) -> None:
    """Writes the newest checkpoint's EMA weights in float16, its config and what it was trained on.

    folder: replaced if it exists; if the export fails, it is unchanged.

    Raises CheckpointError where no checkpoint can be loaded, and InvalidValue for a weight beyond
    the range of float16.
    """
    joint, step = jdm.load(workdir), checkpoint.newest(workdir)
    # NumPy arrays, since Orbax stores the devices of JAX arrays.
    half = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), joint.weights)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(half)):
        raise InvalidValue("workdir", str(workdir), "has a weight beyond the range of float16")
    with whole_folder(folder) as partial:
        write_work_folder(partial, step, half, config_to_dict(joint.config), joint.dataset)
        shutil.rmtree(folder, ignore_errors=True)


def measure(joint: jdm.Joint) -> dict:
    """Validation accuracy, and for each guidance the metrics of samples with SEEDS."""
    splits = {name: load_split("digits", name) for name in ("train", "validation", "test")}
    found = evaluate(joint, ["classification"], splits["validation"], EvaluationOptions(180))
    measured = {"validation": dict(found)}
    labels = np.arange(len(SEEDS)) % joint.model.num_classes
    for guidance in GUIDANCE:
        samples = jdm.sample(joint, labels=labels, seeds=SEEDS, guidance=guidance)
        measured[guidance] = score(samples, splits)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--write", action="store_true", help="export into the package")
    other.add_argument("--steps", type=int, help="training steps, for comparison")
    arguments = parser.parse_args()

    startup.set_up()
    steps = [] if arguments.steps is None else [f"--config.train.steps={arguments.steps}"]
    trainer.train(load_config("digits", [*OVERRIDES, *steps]), arguments.workdir)
    folder = PRETRAINED["digits"] if arguments.write else arguments.workdir / "half"
    export(arguments.workdir, folder)
    print(json.dumps(measure(jdm.load(folder)), indent=2))
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
