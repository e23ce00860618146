"""Checkpoints: Orbax behind one small wrapper.

Owns `<workdir>/checkpoints/` and all that is written there:

    checkpoints/<step>/weights/          EMA of {params, batch_stats}, a pytree
                       train_state/      step, parameters, optimiser state, ..., a pytree
                       data/             position of the input pipeline, JSON
                       config/           the resolved config, JSON
                       checksums.json    SHA-256 of every other file, {relative path: hex digest}
    checkpoints/<step>.partial           a save that was cut short; the next save removes it
    checkpoints/<step>.bad               a step that failed its checksums, set aside, never deleted

Two promises. A step has its final name only when it is whole: everything is written beside it,
synced, and renamed once (object stores rename file by file; there the checksums, which are copied
with the rest, tell a half-renamed step from a whole one). And no value is handed out that differs
from what was saved: Orbax restores a flipped bit silently, so files are hashed before use.

Does not own: what the trees hold, when to save, the folder's other files, or where arrays live:
the caller's abstract targets carry the shardings. One job writes to a work folder at a time; in a
job of several processes all of them call `save`, `newest_whole` and `restore` together, on one
shared file system.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jdm.orbax import HANDLERS, checkpointer, quiet

CHECKSUMS = "checksums.json"


class CheckpointError(RuntimeError):
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
) -> None:
    """Saves one step; returns when it is on disk under its final name.

    Args:
      workdir: the work folder; made if need be.
      step: training step, >= 0.
      weights, train_state: pytrees of arrays, sharded or not.
      config, data: what JSON can hold. An item that is None is left out: a converted model has
        weights and a config only.
      keep: how many steps to keep, >= 1. The oldest beyond it are deleted once the new step is in
        place, never the new step itself.

    Raises:
      CheckpointError: the step exists already (resuming never needs to replace one), or anything
        failed on the way, such as a full disk; earlier steps are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = _folder(workdir)
    final, partial = folder / str(step), folder / f"{step}.partial"
    if final.exists():
        raise CheckpointError(f"{final} exists already and is not overwritten")
    items = {"weights": weights, "train_state": train_state}
    args = {k: ocp.args.StandardSave(v) for k, v in items.items() if v is not None}
    items = {"data": data, "config": config}
    args |= {k: ocp.args.JsonSave(v) for k, v in items.items() if v is not None}
    writer = jax.process_index() == 0
    try:
        if writer:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
        with checkpointer() as writing:
            writing.save(partial, args=ocp.args.Composite(**args))
        if writer:
            _drop_paths(partial)
            _seal(partial)
            partial.rename(final)
            _sync(folder)
    except Exception as error:  # Orbax, tensorstore and the OS each raise types of their own
        if writer:
            _sweep_failed(folder)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"could not save {final}: {cause}") from error
    if writer:
        for old in [s for s in steps(workdir)[:-keep] if s != step]:
            try:  # renamed first: not even a half-deleted step has its final name
                (folder / str(old)).rename(folder / f"{old}.partial")
                _sweep(folder)
            except OSError as error:
                raise CheckpointError(f"saved {final}, could not delete {old}: {error}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jdm.checkpoint.save {step}")


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps that have their final name, ascending; [] where there are none."""
    folder = _folder(workdir)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def items(workdir: epath.PathLike, step: int) -> set[str]:
    """The items that a step holds, of `weights`, `train_state`, `data` and `config`."""
    root = _folder(workdir) / str(step)
    return {item for item in HANDLERS if (root / item).is_dir()}


def newest(workdir: epath.PathLike) -> int:
    """The newest step by name, not verified; what `load` takes where no step is named.

    Raises:
      CheckpointError: there is none.
    """
    found = steps(workdir)
    if not found:
        raise CheckpointError(_absent(_folder(workdir), "checkpoint"))
    return found[-1]


def newest_whole(workdir: epath.PathLike, *, log: Callable[[str], Any] = print) -> int | None:
    """The newest step that passes `verify`, None where there is none; what `train` resumes from.

    Steps that fail are set aside on the way down: renamed to `<step>.bad` (`<step>.bad-2`, ...
    where that name is taken) and reported through `log`, one line each.
    """
    found = None
    if jax.process_index() == 0:
        folder = _folder(workdir)
        for step in reversed(steps(workdir)):
            try:
                verify(workdir, step)
            except CheckpointError as error:
                aside, n = folder / f"{step}.bad", 2
                while aside.exists():
                    aside, n = folder / f"{step}.bad-{n}", n + 1
                (folder / str(step)).rename(aside)
                log(f"set aside a damaged checkpoint as {aside}: {error}")
            else:
                found = step
                break
    if jax.process_count() > 1:
        sent = np.int32(-1 if found is None else found)
        agreed = int(multihost_utils.broadcast_one_to_all(sent))
        found = None if agreed < 0 else agreed
    return found


def verify(workdir: epath.PathLike, step: int, *, items: Iterable[str] = tuple(HANDLERS)) -> None:
    """Compares a step's files with its checksums.

    Args:
      workdir, step: which step.
      items: hash only the files of these items and those beside them, so that `load` need not read
        the optimiser. Damage elsewhere then goes unnoticed, and unused.

    Raises:
      CheckpointError: naming the file that is missing, differs from its checksum or was added.
        Hidden files may be added: file managers and network file systems leave them everywhere.
    """
    root, items = _folder(workdir) / str(step), set(items)
    if not root.is_dir():
        raise CheckpointError(_absent(root.parent, f"checkpoint of step {step}"))
    try:
        expected = json.loads((root / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{root / CHECKSUMS} is missing") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise CheckpointError(f"{root / CHECKSUMS} is damaged: {error}") from None
    files = _files(root)
    for name in sorted(expected.keys() | files.keys()):
        top, below, _ = name.partition("/")
        if below and top not in items:
            continue
        if name not in files:
            raise CheckpointError(f"{root / name} is missing")
        if name in expected and _digest(files[name]) != expected[name]:
            raise CheckpointError(f"{root / name} is damaged: it differs from its checksum")
        if name not in expected and not files[name].name.startswith("."):
            raise CheckpointError(f"{root / name} is not listed in {CHECKSUMS}")


def restore(
    workdir: epath.PathLike,
    step: int,
    *,
    weights: PyTree | None = None,
    train_state: PyTree | None = None,
    widen: bool = False,
) -> dict[str, PyTree]:
    """Verifies and restores the items for which a target is given, and reads no others.

    Args:
      workdir, step: which step.
      weights, train_state: abstract targets, pytrees of `jax.ShapeDtypeStruct` whose shardings say
        where each array goes; they need not be those it was saved with.
      widen: floats may have been saved with fewer bits than their target has, such as float16 for
        float32; no value changes. Otherwise every dtype must be the target's.

    Returns:
      {item: pytree of arrays, with the structure, dtypes and shardings of its target}.

    Raises:
      CheckpointError: the step is missing or damaged, or an item does not fit its target.
      ValueError: a target carries no sharding. (Orbax would take the devices of the saving job,
        which fails on any other number of them.)
    """
    given = {"weights": weights, "train_state": train_state}
    targets = {item: target for item, target in given.items() if target is not None}
    for item, target in targets.items():
        for key, leaf in _leaves(target).items():
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(f"the restore target of {item} has no sharding at {key}")
    return _read(workdir, step, targets, widen)


def read_config(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """The config saved with a step, verified. Raises CheckpointError as `restore` does."""
    return _read(workdir, step, {"config": None})["config"]


def read_data(workdir: epath.PathLike, step: int) -> Any:
    """The pipeline's position saved with a step, verified. Raises as `restore` does."""
    return _read(workdir, step, {"data": None})["data"]


def _read(
    workdir: epath.PathLike, step: int, targets: dict[str, Any], widen: bool = False
) -> dict[str, Any]:
    """{item: abstract target, or None for JSON} -> {item: what was saved}."""
    verify(workdir, step, items=targets)
    root = _folder(workdir) / str(step)
    args = {}
    for item, target in targets.items():
        if not (root / item).is_dir():
            raise CheckpointError(f"{root} holds no {item}")
        if HANDLERS[item] is ocp.JsonCheckpointHandler:
            args[item] = ocp.args.JsonRestore()
        else:
            _check_fits(root / item, target, widen)
            args[item] = ocp.args.StandardRestore(target)
    with checkpointer() as reading:
        restored = reading.restore(root, args=ocp.args.Composite(**args))
    return {item: restored[item] for item in targets}


def _check_fits(path: epath.Path, target: PyTree, widen: bool) -> None:
    """Orbax names no key when shapes differ and casts dtypes unasked, so both are compared here."""
    with quiet():
        saved = _leaves(ocp.StandardCheckpointHandler().metadata(path).tree)
    wanted = _leaves(target)
    for key in wanted | saved:
        if widen and _widens(saved.get(key), wanted.get(key)):
            continue
        want, found = _describe(wanted.get(key)), _describe(saved.get(key))
        if want != found:
            raise CheckpointError(f"{path} does not fit at {key}: expected {want}, found {found}")


def _leaves(tree: PyTree) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _widens(saved: Any, wanted: Any) -> bool:
    """Whether every value of the saved array is one of the wanted array's type, a wider float."""
    if saved is None or wanted is None or saved.shape != wanted.shape:
        return False
    floats = all(jax.dtypes.issubdtype(x.dtype, np.floating) for x in (saved, wanted))
    return floats and jax.numpy.promote_types(saved.dtype, wanted.dtype) == wanted.dtype


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # Orbax stores the key's data
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"


def _folder(workdir: epath.PathLike) -> epath.Path:
    path = os.fspath(workdir)  # tensorstore takes absolute paths only; a URL is one already
    return epath.Path(path if "://" in path else os.path.abspath(path)) / "checkpoints"


def _absent(folder: epath.Path, wanted: str) -> str:
    """One sentence for "there is no such checkpoint", with what is there instead."""
    if not folder.is_dir():
        return f"no {wanted} in {folder}, which does not exist"
    names = sorted(path.name for path in folder.iterdir())
    told = [f"{n} (a save that was cut short)" if ".partial" in n else n for n in names]
    return f"no {wanted} in {folder}, which holds {', '.join(told) or 'nothing'}"


def _files(root: epath.Path) -> dict[str, epath.Path]:
    """{relative path: path} of every file below a step but the checksums."""
    files = {p.relative_to(root).as_posix(): p for p in _walk(root) if not p.is_dir()}
    return {name: path for name, path in files.items() if name != CHECKSUMS}


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():  # epath has no rglob
        if path.is_dir():
            yield from _walk(path)
        yield path


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_paths(root: epath.Path) -> None:
    """Takes the path of this machine out of Orbax's commit files; a folder may be given to others.

    The files stay: where a rename is a copy, Orbax goes by their being there.
    """
    for path in _walk(root):
        if path.name == "commit_success.txt":
            path.write_text("Checkpoint commit was successful\n")


def _seal(root: epath.Path) -> None:
    """Writes the checksums and syncs all of `root`, so that the rename cannot overtake the data."""
    digests = {name: _digest(path) for name, path in sorted(_files(root).items())}
    (root / CHECKSUMS).write_text(json.dumps(digests, indent=2) + "\n")
    for path in [*_walk(root), root]:
        _sync(path)


def _sync(path: epath.Path) -> None:
    if "://" in os.fspath(path):  # object stores are durable when a write returns
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: epath.Path) -> None:
    """Removes what cut-short saves left, Orbax's own `<step>.partial.orbax-...` included."""
    for path in folder.iterdir():
        if ".partial" in path.name:
            path.rmtree()


def _sweep_failed(folder: epath.Path) -> None:
    """The same after a save that failed, while tensorstore's own threads may still be writing.

    What they write into makes removing it fail, or appears anew: two looks in a row must find
    nothing. What is left after five seconds, the next save removes.
    """
    clean = 0 if folder.is_dir() else 2
    for _ in range(50):
        if clean == 2:
            return
        try:
            left = any(".partial" in path.name for path in folder.iterdir())
            _sweep(folder)
            clean = 0 if left else clean + 1
        except OSError:
            clean = 0
        time.sleep(0.1)
