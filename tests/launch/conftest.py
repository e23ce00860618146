"""A machine of stand-ins, for the tests of launch/."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


class Machine:
    """A folder of stand-ins that comes first on PATH, and a log of how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        path = f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        # Short, so that nothing waits; and `jdm` is that of this checkout.
        self.environment |= dict(
            PATH=path, LAUNCH_PAUSE="0.1", HERE=str(folder), PYTHONPATH=str(ROOT)
        )

    def has(self, name: str, script: str = "") -> None:
        """Puts a stand-in on PATH: what it does after its call was recorded."""
        record = 'printf "%s\\n" "${0##*/} $*" >>"$HERE/calls"\n'
        (self.bin / name).write_text(f"#!/usr/bin/env bash\nset -u\n{record}{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *argv, timeout=120, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *map(str, argv)],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def called(self, name: str = "") -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.startswith(name)]


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path / "machine")
    yield made
    for file in tmp_path.rglob("pid"):  # a training that a failed test has left
        found = Path("/proc") / file.read_text().strip()
        with contextlib.suppress(OSError):
            if b"worker.sh" in (found / "cmdline").read_bytes():
                os.killpg(int(found.name), signal.SIGKILL)


@pytest.fixture
def port(free_port) -> str:
    """The number of a port that is free."""
    return str(free_port())
