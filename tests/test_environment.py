"""Variables of the environment that are empty, missing, or name what is not there."""

import os
import platform
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from jdm import startup
from jdm.data import DataError
from jdm.data.datasets import DATASETS
from jdm.data.records import make_builder


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An empty current folder, a home folder, and none of the variables that name others."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def homeless(bare, monkeypatch):
    """No home folder: HOME is empty, and the user's number is not in the list of users."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", "")


@pytest.mark.parametrize("given", ["", "relative", None])
def test_an_empty_cache_folder_is_that_of_the_home(given, bare, monkeypatch):
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert startup.cache_folder("xla") == bare / "home" / ".cache" / "jdm" / "xla"
    assert not any((bare / "here").iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "cache"))
    assert startup.cache_folder("xla") == bare / "cache" / "jdm" / "xla"


@pytest.mark.parametrize("given", ["", None])
def test_without_a_home_there_is_no_cache_and_one_line(given, homeless, monkeypatch, capsys):
    if given is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    startup.use_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ and not os.listdir()
    err = capsys.readouterr().err
    assert err.startswith("compiled programs are not kept") and "no home folder" in err
    assert err.count("\n") == 1


def test_a_cache_folder_that_cannot_be_made_is_one_line(bare, monkeypatch, capsys):
    (bare / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "file"))
    startup.use_compilation_cache()
    err = capsys.readouterr().err
    assert err.startswith("compiled programs are not kept") and err.count("\n") == 1


@pytest.mark.parametrize("given", ["", None])
def test_an_empty_data_folder_is_that_of_the_home(given, bare, monkeypatch):
    if given is not None:
        monkeypatch.setenv("TFDS_DATA_DIR", given)
    where = Path(make_builder(DATASETS["mnist"], "").data_path)
    assert where.is_relative_to(bare / "home" / "tensorflow_datasets")


def test_without_a_home_the_data_folder_must_be_named(homeless):
    with pytest.raises(DataError, match="^there is no home folder .* --data_dir"):
        make_builder(DATASETS["mnist"], "")
    assert not os.listdir()  # such as a folder called "~"


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config=tiny", "--workdir="],
        ["sample", "--checkpoint="],
        ["sample", "--checkpoint=digits", "--classifier="],
        ["eval", "--checkpoint=digits", "--out="],
    ],
)
def test_an_empty_flag_is_not_a_folder(argv, bare, run):
    done = run(*argv)
    assert done.returncode == 2 and argv[-1].rstrip("=") in done.stderr
    assert "is empty" in done.stderr and done.stderr.count("\n") == 1 and not os.listdir()


def test_a_platform_that_is_not_there_is_one_sentence(bare):
    code = "from jdm.cli import main; main(['train', '--config=tiny', '--workdir=w'])"
    env = {**os.environ, "JAX_PLATFORMS": "abacus", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("jdm train: JAX_PLATFORMS='abacus' cannot be used: ")
    assert "finds cpu" in done.stderr and not Path("w").exists()


ARRAYS = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from jdm import startup
if "keep" in sys.argv:
    startup.keep_memory()
import numpy as np
pool = ThreadPoolExecutor(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def arrays():
    large = [np.ones(2**23) for _ in range(2)]
    if "thread" in sys.argv:
        pool.submit(lambda: len([np.ones(2**22) for _ in range(4)])).result()
arrays()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    arrays()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
before = resident()
startup.release_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("said", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_memory_of_large_arrays_is_kept_unless_the_environment_says_how(said):
    """Counts the pages that the system clears for ten arrays of 64 MiB, and those given back. With
    "thread", also for twenty arrays of 32 MiB of another thread."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | said
    env["PYTHONPATH"] = os.pathsep.join(sys.path)

    def pages(*argv):
        found = subprocess.check_output([sys.executable, "-c", ARRAYS, *argv], env=env)
        return [int(number) for number in found.split()]

    cleared, _ = pages()
    assert cleared > 500
    cleared, released = pages("keep")
    assert (cleared < 50) == (released > 2**27 / 4096 * 0.9) == (not said)
    assert (pages("keep", "thread")[0] < 50) == (not said)


GAPS = """
import ctypes, sys
from jdm import startup
startup.keep_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
free.argtypes = [ctypes.c_void_p]
pieces = [malloc(2000 + 977 * (i % 100)) for i in range(20_000)]
for piece in pieces[::2]:
    free(piece)
if "close" in sys.argv:
    startup.release_memory()
print(sum(malloc(size) > max(pieces) for size in range(3000, 60_000, 3000)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_follows_a_compilation_lies_behind_its_gaps():
    """Of 19 arrays: how many lie behind 20,000 pieces, of which every other one was freed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = [
        int(subprocess.check_output([sys.executable, "-c", GAPS, *argv], env=env))
        for argv in ([], ["close"])
    ]
    assert found == [0, 19]
