"""Orbax as jdm.checkpoint uses it: quiet, in any folder, and no thread outlives a call."""

import contextlib
import functools
import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

# Orbax's own handlers would also store, for each array, the devices that held it, and whether it is
# a random key. That takes a third of the time of a save and is never read: whoever restores says
# where arrays go, and typed random keys are not saved.
_ARRAY = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
_TYPES = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _ARRAY), (np.ndarray, ocp.type_handlers.NumpyHandler())
)
_tree = functools.partial(ocp.PyTreeCheckpointHandler, type_handler_registry=_TYPES)
# The items of a checkpoint, and what each is: a pytree of arrays, or JSON.
HANDLERS = {
    "weights": _tree,
    "train_state": _tree,
    "data": ocp.JsonCheckpointHandler,
    "config": ocp.JsonCheckpointHandler,
}


@contextlib.contextmanager
def checkpointer(alone: bool) -> Iterator[ocp.Checkpointer]:
    """Saves and restores the items of HANDLERS; starts and ends with a barrier of all processes.
    alone: process 0 does so without the others."""
    processes = ocp.options.MultiprocessingOptions(active_processes={0} if alone else None)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=processes),
        **{k: make(multiprocessing_options=processes) for k, make in HANDLERS.items()},
    )
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=processes) as checkpointer:
        try:
            yield checkpointer
        finally:  # when one item fails, Orbax leaves the threads that write the others running
            for thread in threading.enumerate():
                if type(thread).__module__.startswith("orbax."):
                    thread.join()


@contextlib.contextmanager
def literal(folder: epath.Path) -> Iterator[epath.Path]:
    """A path of `folder` that Orbax and tensorstore take as it stands.

    Orbax looks for files with glob, so that a[1] means a1; tensorstore takes a backslash for a
    slash, and no name that is not UTF-8. A folder with such a name is given to them as a symbolic
    link in the folder of temporary files.
    """
    name = os.fspath(folder)
    if "://" in name or _is_plain(name):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jdm-") as temporary:
        link = epath.Path(temporary) / "folder"
        os.symlink(name, link)
        yield link


def _is_plain(name: str) -> bool:
    return not set("*?[]\\") & set(name) and name.isprintable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax, whose threads would print tracebacks beside the error that is raised.

    After an error Orbax stays silenced: writes that end after the call report to an event loop that
    is closed by then, and each would print a traceback.
    """
    loggers, hook = [logging.getLogger("absl"), logging.getLogger("asyncio")], sys.unraisablehook

    def of_others(record: logging.LogRecord) -> bool:
        raised = record.exc_info and record.exc_info[1]
        trace = "".join(traceback.format_exception(raised)) if raised else ""
        return "orbax" not in record.pathname + record.getMessage() + trace

    def unraisable(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            hook(event)

    for logger in loggers:
        logger.addFilter(of_others)
    sys.unraisablehook = unraisable
    yield
    sys.unraisablehook = hook
    for logger in loggers:
        logger.removeFilter(of_others)
