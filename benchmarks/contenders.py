"""Programs that are timed against each other, each in a process of its own, taking turns.

A contender is a script that calls `serve`. It starts, compiles, and then does what it is asked, one
request at a time, so that the others are idle meanwhile. Its memory is the peak of its process.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

# An allocator that keeps its memory: no mapping for each large array, nothing returned. The second
# one has a single heap for all threads.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
KEEPS_MEMORY = KEPT | {"MALLOC_ARENA_MAX": "1"}


class Contender:
    """A running script. arguments: of its command line. environment: added to ours."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (environment or {}),
        )

    def ask(self, request: str) -> Any:
        """The answer to a request. Raises RuntimeError where the process has ended."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:  # -9 is often for lack of memory
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self.process.communicate()


def serve(requests: dict[str, Callable[[], Any]]) -> None:
    """Answers requests until the standard input ends. "memory" is the peak in bytes so far."""
    answers, sys.stdout = sys.stdout, sys.stderr
    requests = {"memory": peak_memory, **requests}
    for line in sys.stdin:
        print(json.dumps(requests[line.strip()]()), file=answers, flush=True)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """The call, as one that returns how many seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run
