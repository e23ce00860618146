"""Paths as users write them; files and folders that appear whole or not at all.

Every path that a user gives goes through `local_path`, once and before anything is read or written;
that of a work folder through `location`, which also takes gs://bucket/folder (see jdm.storage).
Also what belongs to the system in a folder, where the user's home folder is, how JSON that jdm has
written is read back, how a work folder is kept to one job, and how processes take turns.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from jdm.errors import NO_VALUE, Failure, InvalidValue

UNFINISHED = "jdm-partial"  # the ending of what is not whole yet
LOCK = "train.lock"
BUCKET = "gs://"  # how the address of a folder in a bucket begins
LOCAL = "a local path is needed here, such as that of a bucket mounted as a folder"
MARK = ".written-by-jdm"  # the file by which an unfinished folder is known

# What file managers and network file systems add to a folder. It is ignored, and deleted with it.
SYSTEM_FILE = re.compile(r"\.DS_Store|\._.*|\.directory|\.nfs\w+|(?i:desktop\.ini|thumbs\.db)")


def is_system(name: str) -> bool:
    """Whether the system adds files of this name to folders."""
    return SYSTEM_FILE.fullmatch(name) is not None


def read_json(path: Any) -> dict[str, Any]:
    """The JSON object in a file, a pathlib or epath path; a byte order mark is allowed.

    Raises Failure, one sentence that names the file, where it is damaged; OSError where it cannot
    be opened.
    """
    return parse_json(path, path.read_bytes())


def parse_json(path: Any, content: bytes) -> dict[str, Any]:
    """See `read_json`. path: of the file whose content it is, for the error."""
    try:
        found = json.loads(content, object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        why = error if content.strip() else "it is empty"
        raise Failure(f"{path} is damaged: {why}") from None
    return found


@contextlib.contextmanager
def only_job(workdir: Path) -> Iterator[None]:
    """Keeps other jobs out of a work folder. The kernel ends this with the process, even a killed
    one, so that the file `train.lock`, which says who holds the folder, never blocks by itself.

    Raises InvalidValue where another job holds the folder.
    """
    import fcntl  # not on every system that can sample

    with (workdir / LOCK).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second from some network file systems
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "unknown"
            allowed, hint = f"is in use by another job ({holder})", "choose another folder"
            raise InvalidValue("workdir", str(workdir), allowed, hint) from None
        except OSError as error:
            said = "one job at a time may train in it, and this is not checked"
            warnings.warn(f"{workdir} cannot be locked ({error.strerror}): {said}", stacklevel=3)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
        file.flush()
        os.fsync(file.fileno())  # other machines of the same job read it
        yield


@contextlib.contextmanager
def one_at_a_time(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Waits while another process makes the same file or folder; without a lock where the system or
    the disk has none, so that what is done inside must be right for two at once, too. waits: called
    before a wait."""
    lock = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on every system that can sample

            path.parent.mkdir(parents=True, exist_ok=True)
            held_by_name = False
            while not held_by_name:
                file = held.enter_context(lock.open("ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waits()
                    fcntl.flock(file, fcntl.LOCK_EX)
                # Whoever had it before has deleted it, and others may hold a new one of that name.
                with contextlib.suppress(FileNotFoundError):
                    held_by_name = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            held.callback(lock.unlink, missing_ok=True)
        yield


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def new_folder(parameter: str, path: str | os.PathLike, make: bool = False) -> Path:
    """The path, see `local_path`, of a folder that does not exist yet, or is empty.

    make: whether it is made here, so that a folder that cannot be written is known before any work.
    Raises InvalidValue, about the parameter, where it is anything else, or cannot be made.
    """
    folder = Path(local_path(parameter, path))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        taken = "exists and is not empty; a new folder is needed"
        raise InvalidValue(parameter, str(folder), taken)
    return made_folder(parameter, folder) if make else folder


def made_folder(parameter: str, path: str | os.PathLike) -> Path:
    """The path of a folder, which is made where it is missing, and can be written.

    Raises InvalidValue, about the parameter, where that is not so, before any work.
    """
    folder = Path(local_path(parameter, path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InvalidValue(parameter, str(folder), f"cannot be written: {error.strerror}") from None
    return folder


def local_path(parameter: str, path: str | os.PathLike) -> str:
    """The path in the file system that a user's text stands for: ~, $NAME and ${NAME} are expanded,
    file:///x is /x. Anything else stays as it is ("./digits" too).

    Raises InvalidValue, about the parameter, for an empty path, for gs://, s3:// and other URLs,
    and for an environment variable or a user that does not exist.
    """
    given = os.fspath(path)

    def refuse(allowed: str, hint: str = ""):
        raise InvalidValue(parameter, given, allowed, hint)

    if not given:
        raise InvalidValue(parameter, NO_VALUE, "is empty; a path is needed")
    # pathlib makes one slash of two. A single letter is a drive of Windows.
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", given):
        scheme = url[1].lower()
        if scheme != "file":
            if scheme == "hf":
                refuse("is the address of a model; a local path is needed here")
            if scheme == "gs":
                refuse("is in a bucket", LOCAL)
            refuse(f"begins with {scheme}://, which is not supported", LOCAL)
        host, slash, rest = re.sub(r"^.{5}(//)?", "", given, count=1).partition("/")
        if host not in ("", "localhost"):
            refuse(f"is a file of the host {host}", "file:///path is a file of this machine")
        return os.fsdecode(unquote_to_bytes(os.fsencode(slash + rest)))
    for bare, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", given, re.ASCII):
        if (name := bare or braced) not in os.environ:
            refuse(f"names the environment variable {name}, which is not set")
    own = home() if re.match("~(/|$)", given) else None  # not where $HOME is empty
    expanded = os.path.expandvars(f"{own}{given[1:]}" if own else os.path.expanduser(given))
    if given.startswith("~") and expanded.startswith("~"):
        refuse("names a user who does not exist", f"./{given} is a path that begins with ~")
    return expanded


def location(parameter: str, path: str | os.PathLike) -> str:
    """The path of a work folder, see `local_path`, or its address in a bucket, gs://bucket/folder.

    Raises InvalidValue, about the parameter, as `local_path` does, and for an address that Google
    Cloud Storage, gcsfs or Orbax would not understand alike.
    """
    given = os.fspath(path)
    if not (scheme := re.match("gs:/+", given, re.IGNORECASE)):  # pathlib makes one slash of two
        return local_path(parameter, path)
    rest = given[scheme.end() :].rstrip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+(/.+)?", rest):
        raise InvalidValue(
            parameter, given, "is not the address of a folder in a bucket: gs://bucket/folder"
        )
    if special := re.search(r"[*?#\[\]\\\x00-\x1f]|(^|/)\.{1,2}(/|$)", rest):
        said = f"has {special[0]!r} in its name, which is not allowed in a bucket"
        raise InvalidValue(parameter, given, said)
    return BUCKET + re.sub("/+", "/", rest)


def home() -> Path | None:
    """The user's home folder; None where there is none. An empty $HOME, like every variable of the
    environment that jdm reads, counts as not set."""
    import pwd  # not on every system that can sample

    try:
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a container may run under a number that is no user's
        return None


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file, replacing one that is there; a failed write changes nothing at `path`."""
    partial = path.with_name(f"{path.name}.{UNFINISHED}")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # a rename may survive a power cut that its content does not
    partial.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path, ending: str = UNFINISHED) -> Iterator[Path]:
    """A new folder to fill, which is renamed to `path` where nothing is raised, else removed.

    ending: of its name until then; unique where several processes may write the same folder.

    Raises InvalidValue where a folder of the unfinished name is there that was not made here, and
    OSError where `path` is not absent or an empty folder by then.
    """
    partial = path.with_name(f"{path.name}.{ending}")
    mark = partial / MARK
    if partial.exists() and not mark.is_file():
        said = "is in the way, and jdm has not made it"
        raise InvalidValue(str(partial), NO_VALUE, said, "move it away")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        mark.touch()
        yield partial
        mark.unlink()
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
