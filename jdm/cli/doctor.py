"""jdm doctor: what a report of a fault needs to say about a machine, in one screen."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jdm
from jdm import startup
from jdm.cli.shared import add_data_dir, data_dir
from jdm.messages import say

HELP = "Show versions, devices, memory, disks and what is missing, to paste into an issue."
EXAMPLE = "jdm doctor"

PACKAGES = "jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets numpy".split()
# What the extras of setup.cfg are for.
EXTRAS = {
    "prepare": "jdm data prepare of downloaded data sets",
    "fid": "--features=inception",
    "torch": "jdm convert",
    "serve": "jdm serve",
    "hub": "hf://owner/name and jdm push",
    "gcs": "work folders at gs://bucket/folder",
    "plan": "jdm plan",
    "test": "make test",
    "docs": "make docs",
}
GIB = 2**30

Lines = Iterator[tuple[str, str]]


def add_flags(command: argparse.ArgumentParser) -> None:
    add_data_dir(command)


def run(arguments: argparse.Namespace) -> None:
    where = data_dir(arguments)
    startup.set_up()
    sections: tuple[Callable[[], Lines], ...] = (
        versions,
        extras,
        devices,
        memory,
        compilation_cache,
        lambda: prepared_data(where),
    )
    for section in sections:
        try:
            for name, text in section():
                print(f"{name:10} {text}".rstrip(), flush=True)
        # Whatever is broken is what this command is asked about, and the rest is shown too.
        except Exception as error:
            say(f"could not be found out: {type(error).__name__}: {error}")


def versions() -> Lines:
    yield "jdm", f"{jdm.__version__} in {Path(jdm.__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    found = [f"{name} {_version(name)}" for name in PACKAGES]
    yield "packages", ", ".join(found)
    given = [name for name in sorted(os.environ) if name.startswith(("JAX_", "XLA_", "MALLOC_"))]
    for name in given:
        yield "set", f"{name}={os.environ[name]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def extras() -> Lines:
    """Which packages each extra lacks, or has at a version that is too old or too new."""
    from packaging.requirements import Requirement

    try:
        installed = importlib.metadata.metadata("jdm")
    except importlib.metadata.PackageNotFoundError:
        yield "extras", "unknown: jdm is imported from a folder and not installed"
        return
    needed = [Requirement(text) for text in installed.get_all("Requires-Dist", [])]
    for extra, what in EXTRAS.items():
        if extra not in installed.get_all("Provides-Extra", []):
            yield f"[{extra}]", "unknown: jdm was installed from an older version: install it again"
            continue
        of_extra = [one for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
        wrong = [problem for one in of_extra if (problem := _problem(one))]
        lacks = f"{', '.join(wrong)}: pip install 'jdm[{extra}]'" if wrong else "complete"
        yield f"[{extra}]", f"{lacks} (for {what})"


def _problem(requirement) -> str:
    found = _version(requirement.name)
    if found == "is missing":
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is not {requirement.specifier}"
    return ""


def devices() -> Lines:
    import jax

    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        text = f"{device.platform} {device.id}: {device.device_kind}"
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            text += f", {free / GIB:.1f} of {stats['bytes_limit'] / GIB:.1f} GiB free"
        yield "device", text


def memory() -> Lines:
    import jax

    from jdm.sampling.programs import free_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{cores} of {os.cpu_count()} for this process"
    total, known = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), Path("/proc/meminfo")
    lines = known.read_text().splitlines() if known.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    available = "".join(f", {one / GIB:.1f} GiB available" for one in free)
    yield "memory", f"{total / GIB:.1f} GiB{available}"
    device = jax.local_devices()[0]
    yield "", f"a program of jdm may use {free_memory(device) / GIB:.1f} GiB of {device.platform} 0"


def compilation_cache() -> Lines:
    """Whether a program that is compiled now can be read back."""
    import jax
    import jax.numpy as jnp

    if not (where := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        yield "cache", "none, so that every process compiles again"
        return
    folder = Path(where)
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    yield "cache", f"{folder}: {len(files):,} files of {size / GIB:.2f} GiB, {_free(folder)}"
    hits = []

    def count(event: str, **_) -> None:
        hits.append(event == "/jax/compilation_cache/cache_hits")

    least = "jax_persistent_cache_min_compile_time_secs"  # of what is kept
    before = getattr(jax.config, least)
    jax.config.update(least, 0)
    jax.monitoring.register_event_listener(count)
    try:
        for _ in range(2):
            jax.jit(lambda x: jnp.tanh(x) * 1.25)(jnp.float32(1)).block_until_ready()
    finally:
        jax.config.update(least, before)
    yield "", "works" if any(hits) else "does not work: a program was not found again"


def prepared_data(where: str) -> Lines:
    """Which data sets are prepared, and whether the first and last record of each can be read."""
    from jdm.data import DataError
    from jdm.data.datasets import DATASETS
    from jdm.data.records import Records, data_root, is_prepared
    from jdm.data.splits import stored_split

    root = Path(data_root(where))
    yield "data", f"{root}: {_free(root)}"
    for name, facts in DATASETS.items():
        try:
            if not is_prepared(name, where):
                continue
            for split in sorted({stored_split(facts, one) for one in facts.splits}):
                records = Records(facts, split, where)
                records.__getitems__([0, len(records) - 1])
            yield "", f"{name}: prepared"
        except DataError as error:
            yield "", f"{name}: {error}"


def _free(folder: Path) -> str:
    """The free space of the disk that holds a folder, which may not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / GIB:.1f} GiB of the disk free"
