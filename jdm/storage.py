"""Where a work folder is: on a disk, or in a bucket of Google Cloud Storage (gs://bucket/folder).

Owns what the two do differently. A disk renames a folder in one step, adds lines to a file, and
keeps locks. A bucket holds objects: each is written whole or not at all, nothing is renamed, and
folders are what names have in common. A bucket that is mounted as a folder is a disk here, see
docs/launch.md.

    storage_of(path).write(path, content)      all or nothing, on either

Does not know what the files hold. Buckets need gcsfs (the extra `gcs`), which epath uses; Orbax
writes its arrays through tensorstore. Both find Google's credentials by themselves.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from jdm import files
from jdm.errors import Failure, InvalidValue
from jdm.lease import held

# Where TensorFlow is installed (the extra `prepare`), epath would use it instead of gcsfs, and
# gcsfs would ask for the kind of each bucket over gRPC. Both are read when they are first used.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

CHUNK = 2**24  # bytes of an object that are read at once
AT_ONCE = 16  # objects
LOG_IN = "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS gives others"


class BucketError(Failure):
    """A bucket that refuses, or cannot be reached. allowed, hint: as in an InvalidValue."""

    def __init__(self, path: Any, allowed: str, hint: str = ""):
        super().__init__(f"{path} {allowed}" + (f"; {hint}" if hint else ""))
        self.path, self.allowed, self.hint = path, allowed, hint


def storage_of(path: epath.PathLike) -> "Disk | Bucket":
    """What a path is on. Raises Failure for gs:// without gcsfs."""
    return _bucket() if os.fspath(path).startswith(files.BUCKET) else Disk()


class Disk:
    """A file system of folders and files."""

    renames = True  # whether a folder can be renamed, in one step
    sync_every: float | None = None  # seconds; None where each line is kept as it is written

    def check(self, parameter: str, folder: epath.Path) -> None:
        """Raises InvalidValue, about the parameter, where it cannot be asked what a folder holds,
        before any work."""

    def make(self, parameter: str, folder: epath.Path) -> None:
        """Makes a folder where it is missing. Raises InvalidValue, about the parameter, where it
        cannot be written."""
        files.made_folder(parameter, folder)

    @contextlib.contextmanager
    def only_job(self, workdir: epath.Path) -> Iterator[Callable[[], None]]:
        """Keeps other jobs out of a work folder. Gives a function that raises Failure where another
        job has taken over all the same. Raises InvalidValue where another job holds the folder."""
        with files.only_job(Path(workdir)):
            yield lambda: None

    def names(self, folder: epath.Path) -> list[str]:
        """What is in a folder; [] where it does not exist."""
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def folders(self, folder: epath.Path) -> list[str]:
        """The names of the folders in a folder; [] where it does not exist."""
        return [name for name in self.names(folder) if (folder / name).is_dir()]

    def files(self, folder: epath.Path, follow: bool = True) -> dict[str, epath.Path]:
        """{relative path: path} of all files in a folder and below. follow: also of those that are
        below symbolic links; else the links count as files."""
        found = {path.relative_to(folder).as_posix(): path for path in _walk(folder, follow)}
        return {
            name: path
            for name, path in found.items()
            if not path.is_dir() or (not follow and os.path.islink(path))
        }

    def read(self, path: epath.Path) -> bytes:
        """Raises FileNotFoundError."""
        return path.read_bytes()

    def read_json(self, path: epath.Path) -> dict[str, Any]:
        """See files.read_json."""
        return files.parse_json(path, self.read(path))

    def digests(self, paths: Iterable[epath.Path]) -> Iterator[str]:
        """The SHA-256 of each file, hexadecimal."""
        return map(self._digest, paths)

    def _digest(self, path: epath.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, path: epath.Path, content: bytes | str) -> None:
        """Writes a file, replacing one that is there, or changes nothing."""
        files.write_whole(Path(path), content)

    def publish(self, unfinished: epath.Path, final: epath.Path, last: str, content: str) -> None:
        """Adds the file `last` to a folder, which then has its final name, whole and durably."""
        (unfinished / last).write_text(content)
        for path in [*_walk(unfinished), unfinished]:
            _sync(path)
        unfinished.rename(final)
        _sync(final.parent)

    def move(self, path: epath.Path, to: epath.Path) -> None:
        """Moves a file or a folder to a path that is free."""
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)

    def remove(self, folder: epath.Path) -> None:
        """Deletes a folder with all that is in it."""
        folder.rmtree()

    def lines(self, path: epath.Path) -> "Lines":
        """A file to add lines to."""
        return Lines(path)

    @contextlib.contextmanager
    def mirrored(self, folder: epath.Path) -> Iterator[tuple[str, Callable[[], None]]]:
        """(a local folder, a function). What others write into the first is in `folder` after each
        call of the second."""
        yield os.fspath(folder), lambda: None


class Bucket(Disk):
    """A bucket of Google Cloud Storage. What is not said here is as in Disk."""

    renames = False
    sync_every = 60.0  # as lines are added to a file by writing all of it again

    def __init__(self, fs: Any):
        self._fs = fs  # gcsfs, through fsspec

    def check(self, parameter: str, folder: epath.Path) -> None:
        bucket, _, path = os.fspath(folder).removeprefix(files.BUCKET).partition("/")
        try:
            with _reported(folder):
                self._fs.call("GET", "b/{}/o", bucket, prefix=path, maxResults=1, json_out=True)
        except FileNotFoundError:
            allowed = f"is in no bucket: {bucket} does not exist"
            raise InvalidValue(parameter, os.fspath(folder), allowed) from None
        except BucketError as error:
            if not error.hint:
                raise
            refused = (os.fspath(folder), error.allowed, error.hint)
            raise InvalidValue(parameter, *refused) from error

    def make(self, parameter: str, folder: epath.Path) -> None:
        """Nothing: a bucket has no folders. `only_job` writes the first object."""

    @contextlib.contextmanager
    def only_job(self, workdir: epath.Path) -> Iterator[Callable[[], None]]:
        with held(os.fspath(workdir), files.LOCK) as lease:
            yield lease.check

    def names(self, folder: epath.Path) -> list[str]:
        return [name for name, _ in self._listed(folder)]

    def folders(self, folder: epath.Path) -> list[str]:
        return [name for name, kind in self._listed(folder) if kind == "directory"]

    def _listed(self, folder: epath.Path) -> list[tuple[str, str]]:
        # epath's own is_dir and exists take a bucket that does not answer for an empty one.
        try:
            with _reported(folder):
                found = self._fs.ls(os.fspath(folder), detail=True)
        except FileNotFoundError:
            return []
        return [(one["name"].rstrip("/").rpartition("/")[2], one["type"]) for one in found]

    def files(self, folder: epath.Path, follow: bool = True) -> dict[str, epath.Path]:
        with _reported(folder):
            found = [epath.Path(files.BUCKET + name) for name in self._fs.find(os.fspath(folder))]
        return {path.relative_to(folder).as_posix(): path for path in found}

    def read(self, path: epath.Path) -> bytes:
        with _reported(path):
            return self._fs.cat_file(os.fspath(path))

    def digests(self, paths: Iterable[epath.Path]) -> Iterator[str]:
        with ThreadPoolExecutor(AT_ONCE) as pool:  # an answer takes longer than its content
            yield from pool.map(self._digest, paths)

    def _digest(self, path: epath.Path) -> str:
        found = hashlib.sha256()
        with _reported(path), self._fs.open(os.fspath(path), "rb", block_size=CHUNK) as file:
            while content := file.read(CHUNK):
                found.update(content)
        return found.hexdigest()

    def write(self, path: epath.Path, content: bytes | str) -> None:
        with _reported(path):
            data = content.encode() if isinstance(content, str) else content
            self._fs.pipe_file(os.fspath(path), data)

    def publish(self, unfinished: epath.Path, final: epath.Path, last: str, content: str) -> None:
        """`unfinished` is `final`, and counts as whole when `last` is there."""
        self.write(final / last, content)

    def move(self, path: epath.Path, to: epath.Path) -> None:
        """Copies each object inside Google Cloud, then deletes it."""
        with _reported(path):
            names = self._fs.find(os.fspath(path))
            for name in names:
                below = (files.BUCKET + name).removeprefix(os.fspath(path))
                self._fs.cp_file(name, os.fspath(to) + below)
            self._fs.rm(names)

    def remove(self, folder: epath.Path) -> None:
        with _reported(folder), contextlib.suppress(FileNotFoundError):
            self._fs.rm(os.fspath(folder), recursive=True)

    def lines(self, path: epath.Path) -> "Lines":
        return ObjectLines(self, path)

    @contextlib.contextmanager
    def mirrored(self, folder: epath.Path) -> Iterator[tuple[str, Callable[[], None]]]:
        with tempfile.TemporaryDirectory(prefix="jdm-") as local:

            def sync() -> None:
                for path in Path(local).iterdir():
                    self.write(folder / path.name, path.read_bytes())

            yield local, sync


class Lines:
    """A file that lines are added to."""

    def __init__(self, path: epath.Path):
        self._file = Path(path).open("ab")

    def add(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Returns when what was added outlives the machine. A mounted bucket gets it only now."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ObjectLines(Lines):
    """An object that lines are added to: `sync` writes all of it again."""

    def __init__(self, bucket: Bucket, path: epath.Path):
        self._bucket, self._path, self._changed = bucket, path, False
        try:
            self._content = bytearray(bucket.read(path))
        except FileNotFoundError:
            self._content = bytearray()

    def add(self, line: bytes) -> None:
        self._content += line
        self._changed = True

    def sync(self) -> None:
        if self._changed:
            self._bucket.write(self._path, bytes(self._content))
            self._changed = False

    def close(self) -> None:
        self.sync()


def _walk(folder: epath.Path, follow: bool = True) -> Iterator[epath.Path]:
    """What is below a folder, files before their folders. follow: also below symbolic links."""
    for path in folder.iterdir():  # epath has no rglob
        if path.is_dir() and (follow or not os.path.islink(path)):
            yield from _walk(path, follow)
        yield path


def _sync(path: epath.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _bucket() -> Bucket:
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        package = (error.name or "gcsfs").split(".")[0]
        raise Failure(f"gs:// needs {package}: pip install 'jdm[gcs]'") from error
    # It logs a traceback beside each error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    with _reported(files.BUCKET):
        fs = fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses
    fs.dircache.use_listings_cache = False  # other processes write, too
    fs.invalidate_cache()
    return Bucket(fs)


@contextlib.contextmanager
def _reported(path: Any) -> Iterator[None]:
    """What gcsfs raises as a BucketError, but for FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, Failure):
        raise
    except Exception as error:  # of gcsfs, aiohttp, requests and google.auth
        text = " ".join(str(error).split()) or type(error).__name__
        credentials = type(error).__module__.startswith("google.auth")
        forbidden = re.match(r"Forbidden: \S+ ?(.*)", text)
        if forbidden or credentials or getattr(error, "code", None) in (401, 403):
            said = forbidden[1] if forbidden else text
            allowed = f"may not be used with the credentials at hand ({said or 'forbidden'})"
            raise BucketError(path, allowed, LOG_IN) from error
        raise BucketError(path, f"cannot be reached: {text}") from error
