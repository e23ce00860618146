"""Orbax as jdm.checkpoint uses it: silent, and with none of its threads left behind."""

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

# The items of a checkpoint, and what each is: a pytree of arrays, or JSON.
HANDLERS = {
    "weights": ocp.StandardCheckpointHandler,
    "train_state": ocp.StandardCheckpointHandler,
    "data": ocp.JsonCheckpointHandler,
    "config": ocp.JsonCheckpointHandler,
}


@contextlib.contextmanager
def checkpointer() -> Iterator[ocp.Checkpointer]:
    """Saves and restores the items of HANDLERS; begins and ends with a barrier of all processes."""
    handler = ocp.CompositeCheckpointHandler(**{k: make() for k, make in HANDLERS.items()})
    with quiet(), ocp.Checkpointer(handler) as checkpointer:
        try:
            yield checkpointer
        finally:  # where one item fails, Orbax leaves the threads that write the others running
            for thread in threading.enumerate():
                if type(thread).__module__.startswith("orbax."):
                    thread.join()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax: a failure raises, and its threads' tracebacks would bury that one sentence.

    After a failure the silence stays: writes still under way end after the call, each telling an
    event loop that is closed by then, a traceback per array.
    """
    loggers, hook = [logging.getLogger("absl"), logging.getLogger("asyncio")], sys.unraisablehook

    def elsewhere(record: logging.LogRecord) -> bool:
        raised = record.exc_info and record.exc_info[1]
        trace = "".join(traceback.format_exception(raised)) if raised else ""
        return "orbax" not in record.pathname + record.getMessage() + trace

    def unraisable(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            hook(event)

    for logger in loggers:
        logger.addFilter(elsewhere)
    sys.unraisablehook = unraisable
    yield
    sys.unraisablehook = hook
    for logger in loggers:
        logger.removeFilter(elsewhere)
