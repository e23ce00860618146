"""Settings of a process that runs JAX: where compiled programs are kept, and how memory is kept.

They are for commands and scripts, which own their process. The package changes none by itself.
"""

import ctypes
import functools
import gc
import os
import sys
from pathlib import Path
from typing import Any

from jdm.files import home
from jdm.messages import say

# Of mallopt, in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

_kept = False  # whether keep_memory has had an effect


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
    global _kept
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_MAX, 0)  # no mapping of its own for a large array
        mallopt(M_TRIM_THRESHOLD, -1)  # nothing at the end of the heap is returned
        mallopt(M_ARENA_MAX, 1)  # one heap for all threads
        _kept = True


def release_memory() -> None:
    """Returns memory that was freed to the system, and closes the gaps of the one heap, once.

    Is called after the program that runs longest was compiled. That takes more than a gigabyte in
    small pieces, of which some stay in use. In the tens of thousands of gaps between them the C
    library would look for the place of each array, with a lock that XLA's threads share: a
    training on the digits ran at two thirds of its speed (docs/performance.md).
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)
        if _kept:
            _close_gaps()


@functools.cache  # what it takes is lost to the process
def _close_gaps() -> None:
    """Allocates the gaps of the heap for good, so that all that follows lies behind them. What they
    consist of has been returned to the system, which gives no memory for what nobody writes to."""
    libc = ctypes.CDLL(None)
    malloc, free, sbrk = libc.malloc, libc.free, libc.sbrk
    malloc.restype = sbrk.restype = ctypes.c_void_p
    malloc.argtypes, free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    end = sbrk(0)  # of the heap
    size = 2.0**26
    while size > 1024:  # the C library finds smaller ones at once
        gap = malloc(int(size))
        if gap is None or gap >= end:
            free(gap)
            size *= 0.9


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
