"""Traces of a running program, which xprof opens (`pip install xprof`, `xprof --logdir=FOLDER`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jdm.messages import STDOUT, say

SKIPPED, TRACED = 2, 5  # steps that are not traced, since the first ones are slower, and that are


@contextlib.contextmanager
def trace(folder: Path, what: str) -> Iterator[None]:
    """Writes a trace of what runs in the context. what: how a message names it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would be most of the file
    with jax.profiler.trace(folder, profiler_options=options):
        yield
    say(f"wrote a trace of {what} to {folder}; `xprof --logdir={folder}` opens it", STDOUT)


class StepTrace(contextlib.ExitStack):
    """Traces some steps of a training run: TRACED steps, after SKIPPED ones where there are more.

    folder: where the trace is written; None traces nothing. first, last: the run's first step, and
    its last.
    """

    def __init__(self, folder: Path | None, first: int, last: int):
        super().__init__()
        self.folder, self.first = folder, min(first + SKIPPED, last)
        self.last = min(self.first + TRACED - 1, last)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[list[Any]]:
        """The context of one step. What is put in the list is waited for while the trace runs."""
        results: list[Any] = []
        if self.folder is None or not self.first <= number <= self.last:
            yield results
            return
        if number == self.first:
            self.enter_context(trace(self.folder, f"steps {self.first} to {self.last}"))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield results
            jax.block_until_ready(results)
        if number == self.last:
            self.close()
