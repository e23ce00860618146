"""Checkpoints: a small wrapper of Orbax that adds checksums and one final rename.

Owns `<workdir>/checkpoints/` and everything in it:

    checkpoints/<step>/weights/          EMA of {params, batch_stats}, a pytree
                       train_state/      step, parameters, optimiser state, ..., a pytree
                       data/             position of the input pipeline, JSON
                       config/           the resolved config, JSON
                       checksums.json    SHA-256 of every other file, {relative path: hex digest}
    checkpoints/<step>.partial           an interrupted save; the next save removes it. In a bucket
                                         it is a <step> without checksums.json
    checkpoints/<step>.bad               a damaged step that was set aside; never deleted
    checkpoints/<step>.kept              what a person had put into a step that was deleted

Two promises. A step has its final name only when it is complete: its files are written to another
folder, read back (the names, shapes and dtypes of all arrays, not their values), synced, and
renamed once. A bucket cannot rename: there a step counts from the moment that its checksums are
there, which are written last and deleted first. And only what was saved is restored: Orbax does not
notice a flipped bit, so files are compared with their checksums first.

Does not own what the trees hold, when to save, the other files of the work folder, or where arrays
are placed: the caller's abstract targets carry the shardings. One job at a time writes to a work
folder. In a job of several processes all of them call `save`, `newest_whole` and `restore`
together, on one shared file system.
"""

import contextlib
import json
import os
import traceback
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from jdm import distributed
from jdm.errors import NO_VALUE, Failure, InvalidValue
from jdm.files import BUCKET
from jdm.messages import STDOUT, say
from jdm.orbax import HANDLERS, checkpointer, literal, quiet
from jdm.step_files import (
    ASIDE,
    CHECKSUMS,
    PARTIAL,
    discard,
    files_of,
    free,
    steps_of,
    sweep,
    sweep_failed,
    unfinished,
)
from jdm.storage import BucketError, storage_of
from jdm.trees import differences, leaves


class CheckpointError(Failure):
    """A checkpoint that is missing, damaged, unsuitable or could not be written."""


def save(
    workdir: epath.PathLike,
    step: int,
    *,
    weights: PyTree,
    config: dict[str, Any],
    train_state: PyTree | None = None,
    data: Any = None,
    keep: int,
    keep_every: int = 0,
    spared: int | None = None,
) -> None:
    """Saves one step; returns when it is on disk under its final name.

    workdir: created if it does not exist. step: 0 or more. weights, train_state: pytrees of arrays,
    sharded or not (of a random key, its `jax.random.key_data`). config, data: values that JSON can
    represent. An item that is None is not saved: a converted model has weights and a config only.
    keep: 1 or more; once the new step is in place, all others but the `keep` highest are deleted.
    Not deleted either: steps that divide by keep_every, where it is not 0, and the step `spared`.

    Raises CheckpointError where the step exists already (a resumed run never needs to replace one)
    or writing fails, as on a full disk; earlier steps are unchanged. Raises InvalidValue for keep.
    """
    if keep < 1:
        raise InvalidValue("keep", keep, "must be 1 or more")
    folder = _folder(workdir)
    storage, final, partial = storage_of(folder), folder / str(step), unfinished(folder, step)
    if step in steps_of(folder) or (storage.renames and final.exists()):
        raise CheckpointError(f"{final} exists already and is not overwritten")
    items = dict(weights=weights, train_state=train_state, data=data, config=config)
    items = {item: value for item, value in items.items() if value is not None}
    json_args, tree_args = ocp.args.JsonSave, ocp.args.PyTreeSave
    args = {k: (json_args if _is_json(k) else tree_args)(v) for k, v in items.items()}
    writer = distributed.is_main()
    try:
        if writer:
            if storage.renames:
                folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            if partial.exists():
                raise FileExistsError(f"{partial} is a file or a link: move it away")
        with literal(folder) as plain:
            with checkpointer(alone=distributed.count() == 1) as writing:
                writing.save(plain / partial.name, args=ocp.args.Composite(**args))
            _check_saved(plain / partial.name, items)
        if writer:
            _seal(partial, final)
    except Exception as error:  # Orbax, tensorstore and the OS each raise types of their own
        if writer:
            sweep_failed(folder)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        # The frames of what failed hold content, and gcsfs's views of it that outlive its buffers.
        traceback.clear_frames(error.__traceback__)
        raise CheckpointError(f"could not save {final}: {cause}") from error
    if writer:
        for old in [s for s in steps(workdir)[:-keep] if s not in (step, spared)]:
            if keep_every and old % keep_every == 0:
                continue
            try:
                discard(folder / str(old))
            except (OSError, BucketError) as error:
                raise CheckpointError(f"saved {final}, could not delete {old}: {error}") from error
    distributed.barrier(f"checkpoint.save {step}")


def steps(workdir: epath.PathLike) -> list[int]:
    """The finished steps, ascending; [] where there are none. Reads no checksums."""
    return steps_of(_folder(workdir))


def items(workdir: epath.PathLike, step: int) -> set[str]:
    """The items that a step has, as names of HANDLERS."""
    return _items(_folder(workdir) / str(step))


def newest(workdir: epath.PathLike) -> int:
    """The highest step, not verified. Raises CheckpointError where there are no steps."""
    if not (found := steps(workdir)):
        raise CheckpointError(_absent(_folder(workdir), "checkpoint"))
    return found[-1]


def newest_whole(workdir: epath.PathLike) -> int | None:
    """The highest step that passes `verify`, which training resumes from; None of a new folder.

    Damaged steps above it are set aside: renamed to `<step>.bad` (or `<step>.bad-2`, ..., if that
    name is taken), each with a line that says so.

    Raises CheckpointError, and renames nothing, where there are steps and none is whole: a run
    never starts again from the beginning where it has been further.
    """
    folder, found, damaged = _folder(workdir), -1, {}
    if distributed.is_main():
        for step in reversed(steps(workdir)):
            try:
                verify(workdir, step)
            except CheckpointError as error:
                damaged[step] = error
            else:
                found = step
                break
        aside = any(ASIDE.fullmatch(name) for name in storage_of(folder).names(folder))
        if found < 0 and (damaged or aside):
            found = -2
        for step, why in damaged.items() if found >= 0 else ():
            bad = free(folder / f"{step}.bad")
            storage_of(folder).move(folder / str(step), bad)
            say(f"set aside a damaged checkpoint as {bad}: {why}", STDOUT)
    found = int(distributed.from_main(found))
    if found == -2:
        first = f" ({next(iter(damaged.values()))})" if damaged else ""
        hint = "move this folder away to train from the beginning, or choose another work folder"
        raise CheckpointError(f"no checkpoint in {folder} is whole{first}; {hint}")
    return None if found < 0 else found


def verify(workdir: epath.PathLike, step: int, *, items: Iterable[str] = tuple(HANDLERS)) -> None:
    """Compares a step's files with its checksums.

    items: only the files of these items are compared, and files that belong to no item, so that
    `jdm.load` need not read the optimiser's state.

    Raises CheckpointError where a file is missing or differs from its checksum, and where no file
    of an item has one. Files that are not listed are ignored: the system or a person added them.
    """
    root, items = _folder(workdir) / str(step), set(items)
    if root.name not in storage_of(root).folders(root.parent):
        raise CheckpointError(_absent(root.parent, f"checkpoint of step {step}"))
    expected, files = _checksums(root), files_of(root)
    tops = {name: name.partition("/")[0] for name in sorted(expected)}
    compared = [name for name, top in tops.items() if top in items or top not in HANDLERS]
    for name in compared:
        if name not in files:
            raise CheckpointError(f"{root / name} is missing")
    found = storage_of(root).digests(files[name] for name in compared)
    for name, digest in zip(compared, found, strict=True):
        if digest != expected[name]:
            raise CheckpointError(f"{root / name} is damaged: it differs from its checksum")
    for item in items & _items(root):
        if not any(name.startswith(f"{item}/") for name in expected):
            raise CheckpointError(f"{root / item} is not listed in {CHECKSUMS}")


def restore(
    workdir: epath.PathLike,
    step: int,
    *,
    weights: PyTree | None = None,
    train_state: PyTree | None = None,
    widen: bool = False,
) -> dict[str, PyTree]:
    """{item: pytree of arrays} of the items that have a target, verified; reads no other item.

    weights, train_state: abstract targets, pytrees of `jax.ShapeDtypeStruct` whose shardings say
    where each array is placed; those of the saved arrays may differ. widen: whether floats saved
    with fewer bits than their target's dtype are converted to it, such as float16 to float32, which
    changes no value. Any other difference is an error.

    Raises CheckpointError where the step is missing or damaged, or an item does not fit its target.
    Raises InvalidValue for a target without a sharding. (Orbax would use the devices of the job
    that saved, which fails for any other number of devices.)
    """
    targets = {"weights": weights, "train_state": train_state}
    targets = {item: target for item, target in targets.items() if target is not None}
    for item, target in targets.items():
        for path, leaf in leaves(target).items():
            if getattr(leaf, "sharding", None) is None:
                raise InvalidValue(item, NO_VALUE, f"as a target has no sharding at {path}")
    return _read(workdir, step, targets, widen)


def read_config(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """The config that was saved with a step. Raises CheckpointError as `restore` does."""
    return _read(workdir, step, {"config": None})["config"]


def stored_config(workdir: epath.PathLike) -> tuple[int, dict[str, Any]] | None:
    """(step, config) of the highest step whose config is whole; None where there is none."""
    for step in reversed(steps(workdir)):
        with contextlib.suppress(CheckpointError):
            return step, read_config(workdir, step)
    return None


def read_data(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """The saved position of the input pipeline, and what the data was. Raises CheckpointError as
    `restore` does."""
    found = _read(workdir, step, {"data": None})["data"]
    if not isinstance(found, dict):
        raise CheckpointError(f"step {step} of {workdir} holds no position in the data: {found!r}")
    return found


def _read(
    workdir: epath.PathLike, step: int, targets: dict[str, Any], widen: bool = False
) -> dict[str, Any]:
    """{item: abstract target, or None for JSON} -> {item: what was saved}."""
    verify(workdir, step, items=targets)
    root = _folder(workdir) / str(step)
    held = _items(root)
    for item in targets:
        if item not in held:
            raise CheckpointError(f"{root} holds no {item}")
    with literal(root.parent) as plain:
        for item, target in targets.items():
            if not _is_json(item):
                _check_fits(plain / root.name / item, target, widen, shown=root / item)
        return _load(plain / root.name, targets)


def _is_json(item: str) -> bool:
    return HANDLERS[item] is ocp.JsonCheckpointHandler


def _load(root: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    """What Orbax restores of a folder; see `_read`."""
    args = {item: ocp.args.JsonRestore() for item in targets if _is_json(item)}
    for item in targets.keys() - args.keys():
        places = ocp.checkpoint_utils.construct_restore_args(targets[item])
        args[item] = ocp.args.PyTreeRestore(targets[item], places)
    with checkpointer(alone=distributed.count() == 1) as reading:
        restored = reading.restore(root, args=ocp.args.Composite(**args))
    return {item: restored[item] for item in targets}


def _check_saved(root: epath.Path, items: dict[str, Any]) -> None:
    """Raises an error where what was just saved cannot be read; the arrays are not read."""
    for item, value in items.items():
        if not _is_json(item):
            _check_fits(root / item, value)
    _load(root, {item: None for item in items if _is_json(item)})


def _check_fits(
    path: epath.Path, target: PyTree, widen: bool = False, shown: epath.Path | None = None
) -> None:
    """Raises CheckpointError where a saved pytree does not fit its target.

    Orbax does not name the array when shapes differ, and casts dtypes without asking. shown: the
    path in the error.
    """
    with quiet():
        saved = ocp.StandardCheckpointHandler().metadata(path).tree
    wanted_leaves, saved_leaves = leaves(target), leaves(saved)
    for at, wanted, found in differences(target, saved):
        if not (widen and _widens(saved_leaves.get(at), wanted_leaves.get(at))):
            said = f"does not fit at {at}: expected {wanted}, found {found}"
            raise CheckpointError(f"{shown or path} {said}")


def _widens(saved: Any, wanted: Any) -> bool:
    """Whether both are float arrays of one shape, and the wanted dtype holds every saved value."""
    if saved is None or wanted is None or saved.shape != wanted.shape:
        return False
    floats = all(jax.dtypes.issubdtype(x.dtype, np.floating) for x in (saved, wanted))
    return floats and jax.numpy.promote_types(saved.dtype, wanted.dtype) == wanted.dtype


def _folder(workdir: epath.PathLike) -> epath.Path:
    path = os.fspath(workdir)  # tensorstore needs an absolute path or a URL
    return epath.Path(path if path.startswith(BUCKET) else os.path.abspath(path)) / "checkpoints"


def _items(root: epath.Path) -> set[str]:
    """The items that the folder of a step holds."""
    return HANDLERS.keys() & set(storage_of(root).folders(root))


def _absent(folder: epath.Path, wanted: str) -> str:
    """The message that a checkpoint is missing, with the names of what is there instead."""
    storage = storage_of(folder)
    names = sorted(storage.names(folder))
    if not names and not (storage.renames and folder.is_dir()):
        return f"no {wanted} in {folder}, which does not exist"
    partial = [n for n in names if PARTIAL.fullmatch(n) or (not storage.renames and n.isdecimal())]
    found = [f"{n} (an interrupted save)" if n in partial else n for n in names]
    return f"no {wanted} in {folder}, which holds {', '.join(found) or 'nothing'}"


def _checksums(root: epath.Path) -> dict[str, Any]:
    """{relative path: hex digest} of a step. Raises CheckpointError where they cannot be read."""
    try:
        return storage_of(root).read_json(root / CHECKSUMS)
    except FileNotFoundError:
        raise CheckpointError(f"{root / CHECKSUMS} is missing") from None
    except BucketError:
        raise
    except Failure as error:
        raise CheckpointError(str(error)) from None


def _seal(root: epath.Path, final: epath.Path) -> None:
    """Writes the checksums of what was written, and so finishes the step."""
    storage, files = storage_of(root), files_of(root)
    for path in files.values():
        # On object stores Orbax needs these files to recognise a complete save. They contain paths
        # of this machine, which do not belong in a step that may be published.
        if path.name == "commit_success.txt":
            path.write_text("Checkpoint commit was successful\n")
    names = sorted(files)
    digests = dict(zip(names, storage.digests(files[name] for name in names), strict=True))
    storage.publish(root, final, CHECKSUMS, json.dumps(digests, indent=2) + "\n")
