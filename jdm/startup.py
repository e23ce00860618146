"""Settings of a process that runs JAX: where compiled programs are kept, and how memory is kept.

They are for commands and scripts, which own their process. The package changes none by itself.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

from jdm.files import home
from jdm.messages import say

# Of mallopt, in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def set_up() -> None:
    """All settings. Is called before JAX is imported. Afterwards it works too, but that threads
    which run already keep their heaps."""
    use_compilation_cache()
    keep_memory()
    collect_rarely()


def collect_rarely() -> None:
    """Lets Python look for unused cycles of objects less often. Tracing a program creates millions
    of objects that stay, and looking through them again and again took a fifth of its time."""
    gc.set_threshold(50_000, 20, 50)


def keep_memory() -> None:
    """Lets the C library keep memory that was freed, for the next arrays.

    On a CPU, XLA allocates the memory of a program anew in every call. By default, memory for large
    arrays is returned to the system at once, and the system clears each page when it comes again,
    18,607 in a training step of the config digits (docs/performance.md). The same happens to the
    memory of XLA's threads, if they have heaps of their own: an empty one is returned whatever the
    settings. Is called before JAX starts these threads. Does nothing where the C library is not
    glibc, or where a variable MALLOC_... of the environment says how memory is kept.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_MAX, 0)  # no mapping of its own for a large array
        mallopt(M_TRIM_THRESHOLD, -1)  # nothing at the end of the heap is returned
        mallopt(M_ARENA_MAX, 1)  # one heap for all threads


def release_memory() -> None:
    """Returns memory that was freed to the system. Compiling a program takes more than a gigabyte,
    in small pieces between which a program's own memory does not fit."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Any:
    """The function of the C library; None where it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # TypeError: on Windows
        return None


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk; $JAX_COMPILATION_CACHE_DIR overrides the folder. Says so
    where they cannot be kept."""
    if not (where := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        try:
            where = str(cache_folder("xla"))
        except OSError as error:
            say(f"compiled programs are not kept, unless in $JAX_COMPILATION_CACHE_DIR: {error}")
            os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = where
    if "jax" in sys.modules:  # JAX reads the environment only when it is imported
        sys.modules["jax"].config.update("jax_compilation_cache_dir", where)


def cache_folder(name: str) -> Path:
    """A folder of what can be made again, such as xla, the compiled programs; it is made. Raises
    OSError where that is not possible."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # empty, or relative, which the standard says to ignore
        if (of_user := home()) is None:
            raise OSError("there is no home folder")
        folder = of_user / ".cache"
    folder = folder / "jdm" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
