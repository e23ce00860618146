"""Shared by the data tests: digits, prepared once, and a way to run code in a new process."""

import os
import pathlib
import subprocess
import sys

import pytest

from jdm.data import splits


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> str:
    """A data_dir that holds the prepared digits; do not write into it."""
    folder = str(tmp_path_factory.mktemp("prepared"))
    splits.load_split("digits", "test", splits.ReadOptions(folder))
    return folder


@pytest.fixture(scope="session")
def start_python():
    """start_python(code, *argv) starts a new interpreter that can import jdm."""
    root = pathlib.Path(splits.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}

    def start(code: str, *argv: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
