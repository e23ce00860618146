"""Makes the packaged digits model, jdm.load("digits"): trains it, and keeps its averages alone.

    python benchmarks/pretrained.py --workdir=runs/pretrained --write

writes jdm/pretrained/digits: a work folder with one checkpoint, of weights in half precision and
config. Then it says how good what was written is. Without --write that goes to <workdir>/half, and
--steps takes another length of training: 1,200, the config's, and 2,400 were compared, one training
of each, and the longer one was taken (docs/results.md). Nothing else was tried.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from digits import GUIDANCE, SETTINGS, judge

import jdm
from jdm import checkpoint, cli, trainer
from jdm import config as configs
from jdm.analysis.evaluate import classification
from jdm.data.splits import load_split
from jdm.files import write_whole
from jdm.pretrained import PRETRAINED

OVERRIDES = ("--config.seed=0", "--config.train.steps=2400")
SEEDS = range(2_000_000, 2_000_500)


def export(workdir: str | os.PathLike, folder: Path) -> None:
    """Makes a work folder of another's newest checkpoint: its averages in float16, its config.

    folder: appears whole or not at all; one that is there is replaced.

    Raises CheckpointError where there is no whole checkpoint, ValueError for a weight that float16
    cannot hold.
    """
    joint, step = jdm.load(workdir), checkpoint.newest(workdir)
    # NumPy arrays: of JAX arrays Orbax notes the devices that they were on.
    half = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), joint.weights)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(half)):
        raise ValueError(f"a weight of {workdir} is beyond the range of float16")
    settings = configs.to_dict(joint.config)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.save(partial, step, weights=half, config=settings, keep=1)
    write_whole(partial / "config.json", json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def figures(joint: jdm.Joint) -> dict:
    """Validation accuracy, and for each guidance the figures of samples at SEEDS."""
    names = ("train", "validation", "test")
    splits = {name: load_split("digits", name, joint.config.data.dir) for name in names}
    labels = np.arange(len(SEEDS)) % joint.model.num_classes
    return {
        "validation": dict(classification(joint, *splits["validation"], 180)),
        **{
            guidance: judge(
                jdm.sample(joint, labels=labels, seeds=SEEDS, guidance=guidance, **SETTINGS), splits
            )
            for guidance in GUIDANCE
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--write", action="store_true", help="into the package")
    other.add_argument("--steps", type=int, help="of the training, for comparison")
    arguments = parser.parse_args()

    cli.use_compilation_cache()
    steps = [] if arguments.steps is None else [f"--config.train.steps={arguments.steps}"]
    trainer.train(configs.load("digits", [*OVERRIDES, *steps]), arguments.workdir)
    folder = PRETRAINED["digits"] if arguments.write else arguments.workdir / "half"
    export(arguments.workdir, folder)
    print(json.dumps(figures(jdm.load(folder)), indent=2))
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
