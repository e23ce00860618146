"""Large runs, which write their images in parts and can be interrupted, on one host or several.

    x.npz.parts/request.json      the settings of the run, and the number of images in a part
    x.npz.parts/<first>.npz       a part; <first> is the index of its first image
    x.npz                         written when all parts are there; then the parts are removed

The hosts of one jax.distributed job share a file system and take turns with the parts; the first
host joins them. A run that fits in one part is written without parts.
"""

import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jdm import distributed
from jdm.errors import Failure, InvalidValue
from jdm.files import is_system, read_json, write_whole
from jdm.joint import Joint
from jdm.messages import say
from jdm.numerics import fixed_flags
from jdm.sampling.generate import Batch, concatenate, make_generator
from jdm.sampling.request import Request
from jdm.sampling.samples import check_folder, check_format, differences, read_settings
from jdm.tracking import Progress

LEAST = 256  # the least number of images in a part, where a host has that many
RECORD = "request.json"


def check_out(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Raises InvalidValue where a run to this path would be mixed with another run, or lose one.

    An existing file may be replaced; with `resume` it must not have other settings. An existing
    folder must hold samples of the same settings.
    """

    def refuse(allowed: str, hint: str = ""):
        raise InvalidValue("out", str(out), allowed, hint)

    if check_format(out) == "":
        check_folder(out, settings)
    elif out.is_dir():
        refuse(f"is a folder, and {out.suffix} a file")
    parts, record = _parts(out), _parts(out) / RECORD
    if not record.is_file():
        held = read_settings(out) if resume else None
        if held is not None and (differing := differences(held, settings)):
            refuse(f"is complete, and of other settings: {differing}")
        names = [path.name for path in parts.iterdir()] if parts.exists() else []
        if all(name.startswith(RECORD) or is_system(name) for name in names):
            return  # no parts, or what is left of a run that stopped before its first part
        refuse(f"cannot be written: {parts} is in the way, and holds no interrupted run")
    if not resume:
        hint = f"--resume continues it, and deleting {parts} discards it"
        refuse("has an interrupted run", hint)
    if differing := differences(_recorded(record)["settings"], settings):
        refuse(f"has an interrupted run of other settings: {differing}")


@fixed_flags()
def run(
    joint: Joint,
    request: Request,
    settings: dict[str, Any],
    out: Path,
    *,
    resume: bool = False,
    batch_size: int | None = None,
) -> bool:
    """Generates the images of a request and writes them to `out`; False where all were there.

    settings: see Request.settings. resume: whether to continue an interrupted run to this path.

    Raises InvalidValue as `check_out` does.
    """
    check_out(out, settings, resume)
    distributed.barrier("all hosts have checked the output")  # before a host changes it
    hosts, host = distributed.count(), distributed.index()
    parts, record = _parts(out), _parts(out) / RECORD
    if resume and not record.is_file() and read_settings(out) is not None:
        return False  # complete: `check_out` has compared the settings
    count = len(request.seeds)
    share = -(-count // hosts)
    if record.is_file():
        share = min(share, _recorded(record)["part"])
    say(f"compiling {_summary(request)}")
    rows, batches = make_generator(joint, request.part(slice(0, share)), batch_size)
    each = rows * -(-min(LEAST, share) // rows)  # whole batches
    if hosts == 1 and count <= each and not record.is_file():
        with Progress(count, "sampling", "images") as progress:
            concatenate(request, settings, batches(request, progress)).save(out)
        return True
    if host == 0 and not record.is_file():
        parts.mkdir(exist_ok=True)
        write_whole(record, json.dumps({"settings": settings, "part": each}))
    distributed.barrier("the size of a part is agreed on")
    each = _recorded(record)["part"]
    paths = {start: parts / f"{start:08}.npz" for start in range(0, count, each)}
    ours = {start: path for i, (start, path) in enumerate(paths.items()) if i % hosts == host}
    missing = {start: path for start, path in ours.items() if not _opens(path)}
    sizes = {start: min(each, count - start) for start in ours}
    done = sum(sizes[start] for start in ours.keys() - missing.keys())
    with Progress(sum(sizes.values()), "sampling", "images", done=done) as progress:
        for start, path in missing.items():
            part = request.part(slice(start, start + each))
            whole = concatenate(part, settings, batches(part, progress))
            write_whole(path, _packed(Batch(whole.images, whole.probabilities, whole.trajectory)))
    distributed.barrier("all parts are there")
    if host == 0:
        concatenate(request, settings, map(_unpacked, paths.values())).save(out)
        for path in paths.values():
            path.unlink()
        for path in parts.iterdir():
            if is_system(path.name):
                path.unlink()
        record.unlink()  # last: parts without it belong to no run
        with contextlib.suppress(OSError):  # it holds what a person has put there
            parts.rmdir()
    distributed.barrier("the parts are joined")
    return True


def _summary(request: Request) -> str:
    method, n = request.recipe.method, len(request.seeds)
    guided = f" with guidance {method.guidance}" if request.targets.any() else ""
    return f"{method.sampler} in {method.steps} steps{guided}, for {n} image{'s' * (n > 1)}"


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _recorded(record: Path) -> dict[str, Any]:
    """{"settings", "part"} of an interrupted run. Raises InvalidValue where they are damaged."""
    try:
        found = read_json(record)
        if not isinstance(found.get("settings"), dict) or not isinstance(found.get("part"), int):
            raise Failure(f"{record} is damaged: it has no settings or no part")
    except Failure as error:
        allowed, hint = f"cannot be continued: {error}", f"deleting {record.parent} discards it"
        raise InvalidValue("out", str(record.parent), allowed, hint) from None
    return found


def _packed(batch: Batch) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: x for name, x in batch._asdict().items() if x is not None})
    return buffer.getvalue()


def _unpacked(path: Path) -> Batch:
    with np.load(path) as saved:
        return Batch(saved["images"], saved.get("probabilities"), saved.get("trajectory"))


def _opens(path: Path) -> bool:
    """Whether a part is there and whole; a disk may have failed since it was written."""
    try:
        _unpacked(path)
    except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return True
