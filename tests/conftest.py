"""What the whole suite shares: where it caches, the data, and a few trained models."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"
JDM = Path(sys.executable).with_name("jdm")

# Before JAX is imported, and for the subprocesses of the tests too: compiled programs are kept
# between runs, and data is prepared beside the checkout, not in the user's home.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["TFDS_DATA_DIR"] = str(CACHE / "tfds")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tiny models run for milliseconds and compile for seconds: not optimising halves that. Trained
# models are made without it, in a process of their own.
FAST_COMPILE = "--xla_backend_optimization_level=0"
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "").replace(FAST_COMPILE, "").strip()  # a worker inherits
os.environ["XLA_FLAGS"] = f"{GIVEN_FLAGS} {FAST_COMPILE}".strip()


def _source_hash() -> str:
    """Of all that a trained model depends on: a changed line anywhere trains it anew."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("jdm/**/*.py"), *ROOT.glob("configs/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def optimised() -> dict[str, str]:
    """The environment of a process whose programs are compiled for speed."""
    return {**os.environ, "XLA_FLAGS": GIVEN_FLAGS}


@pytest.fixture(scope="session")
def trained(optimised):
    """(config name, *overrides) -> the path of a work folder trained with it; cached on disk."""
    source = _source_hash()

    def get(name: str, *overrides: str) -> Path:
        key = hashlib.sha256(json.dumps([name, overrides]).encode()).hexdigest()[:16]
        workdir = CACHE / "models" / source / key
        if not (workdir / "config.json").exists():
            for old in (CACHE / "models").glob("*"):
                if old.name != source:
                    shutil.rmtree(old, ignore_errors=True)
            # Its own folder first: two test processes may train the same model at once.
            making = workdir.with_name(f"{key}.{os.getpid()}")
            command = [JDM, "train", f"--config={name}", f"--workdir={making}", *overrides]
            subprocess.run(command, check=True, env=os.environ if name == "tiny" else optimised)
            with contextlib.suppress(OSError):  # the other was first
                making.rename(workdir)
        return workdir

    return get


@pytest.fixture(scope="session")
def tiny(trained) -> Path:
    """The work folder of a `tiny` run of 4 steps."""
    return trained("tiny")
