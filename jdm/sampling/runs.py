"""Large runs: to a file or folder, in parts that outlive an interruption, on one host or several.

    x.npz.parts/request.json      what is made, by which weights, in parts of how many images
    x.npz.parts/<first>.npz       a part, written whole
    x.npz                         appears when all parts are there; then they are removed

Hosts (of one jax.distributed job, on a shared file system) take turns with the parts; the first of
them puts the parts together.
"""

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jdm.files import write_whole
from jdm.joint import Joint
from jdm.sampling.make import Batch, joined, maker
from jdm.sampling.request import Request
from jdm.sampling.samples import check_folder, check_format, differences, read_settings
from jdm.tracking import Progress

LEAST = 256  # images of a part, where a batch is not larger
RECORD = "request.json"


def check_out(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Raises ValueError where a run to this path would mix with another one.

    A file of that name is replaced, once the new one is whole, but for one of other settings that
    was to be resumed; a folder only by the same settings.
    """
    if check_format(out) == "":
        check_folder(out, settings)
    elif out.is_dir():
        raise ValueError(f"out={str(out)!r} is a folder, and {out.suffix} a file")
    parts, record = _parts(out), _parts(out) / RECORD
    if not record.is_file():
        held = read_settings(out) if resume else None
        if held is not None and (differing := differences(held, settings)):
            raise ValueError(f"out={str(out)!r} is complete, and of other settings: {differing}")
        if not parts.exists() or all(path.name.startswith(RECORD) for path in parts.iterdir()):
            return  # nothing, or what is left of a run that was cut off before its first part
        raise ValueError(f"out={str(out)!r}: {parts} is in the way, and holds no interrupted run")
    if not resume:
        raise ValueError(
            f"out={str(out)!r}: a run to it was interrupted; --resume continues it, and deleting "
            f"{_parts(out)} forgets it"
        )
    differing = differences(json.loads(record.read_text())["settings"], settings)
    if differing:
        raise ValueError(f"out={str(out)!r}: the interrupted run had other settings: {differing}")


def run(
    joint: Joint,
    request: Request,
    settings: dict[str, Any],
    out: Path,
    *,
    resume: bool = False,
    batch_size: int | None = None,
) -> bool:
    """Makes the images of a request and writes them to out; whether there was anything to do.

    settings: see Request.settings. resume: goes on where an interrupted run to the same path
    stopped.

    Raises ValueError as `check_out` does.
    """
    check_out(out, settings, resume)
    _meet("all have looked at what is there")  # before the first of them writes anything
    hosts, host = jax.process_count(), jax.process_index()
    if resume and not (_parts(out) / RECORD).is_file() and _complete(out, settings):
        return False
    count, record = len(request.seeds), _parts(out) / RECORD
    share = -(-count // hosts)
    if record.is_file():
        share = min(share, json.loads(record.read_text())["part"])
    print(f"compiling {_in_words(request)}", file=sys.stderr, flush=True)
    rows, make = maker(joint, request.part(slice(0, share)), batch_size)
    if host == 0 and not record.is_file():
        record.parent.mkdir(exist_ok=True)
        each = rows * -(-min(LEAST, share) // rows)  # whole batches
        write_whole(record, json.dumps({"settings": settings, "part": each}))
    _meet("the parts are agreed on")
    each = json.loads(record.read_text())["part"]
    parts = {start: _parts(out) / f"{start:08}.npz" for start in range(0, count, each)}
    mine = [start for i, start in enumerate(parts) if i % hosts == host]
    sizes = {start: min(each, count - start) for start in mine}
    for start in mine:
        if parts[start].is_file() and not _opens(parts[start]):
            parts[start].unlink()
    done = sum(sizes[start] for start in mine if parts[start].is_file())
    with Progress(sum(sizes.values()), "sampling", "images", done=done) as progress:
        for start in mine:
            if parts[start].is_file():
                continue
            part = request.part(slice(start, start + each))
            made = joined(part, settings, list(make(part, progress)))
            write_whole(parts[start], _packed(Batch(made.images, made.probabilities, made.film)))
    _meet("all parts are there")
    if host == 0:
        joined(request, settings, [_unpacked(path) for path in parts.values()]).save(out)
        for path in parts.values():
            path.unlink()
        record.unlink()  # last: parts without it would be anyone's
        record.parent.rmdir()
    _meet("the parts are put together")
    return True


def _in_words(request: Request) -> str:
    method, n = request.method, len(request.seeds)
    guided = "" if method.guidance == "none" else f" under {method.guidance} guidance"
    return f"{method.sampler} in {method.steps} steps{guided}, for {n} image{'s' * (n > 1)}"


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _meet(where: str) -> None:
    """Hosts wait for each other."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the images are there already. A .png or .gif does not say how it was made."""
    held = read_settings(out)
    return held is not None and not differences(held, settings)


def _packed(batch: Batch) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: x for name, x in batch._asdict().items() if x is not None})
    return buffer.getvalue()


def _unpacked(path: Path) -> Batch:
    with np.load(path) as saved:
        return Batch(*(saved[name] if name in saved else None for name in Batch._fields))


def _opens(path: Path) -> bool:
    """Whether a part is as it was written; a disk that failed may have left less."""
    try:
        _unpacked(path)
    except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return True
