"""Paths as users write them; files and folders that appear whole or not at all.

Every path that a user gives goes through `local_path`, once and before anything is read or written.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

from jdm.errors import NO_VALUE, InvalidValue


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
            mounted = "a local path is needed, such as that of a bucket mounted as a folder"
            refuse(f"begins with {scheme}://, which is not supported yet", mounted)
        host, slash, rest = re.sub(r"^.{5}(//)?", "", given, count=1).partition("/")
        if host not in ("", "localhost"):
            refuse(f"is a file of the host {host}", "file:///path is a file of this machine")
        return os.fsdecode(unquote_to_bytes(os.fsencode(slash + rest)))
    for bare, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", given, re.ASCII):
        if (name := bare or braced) not in os.environ:
            refuse(f"names the environment variable {name}, which is not set")
    expanded = os.path.expanduser(os.path.expandvars(given))
    if given.startswith("~") and expanded.startswith("~"):
        refuse("names a user who does not exist", f"./{given} is a path that begins with ~")
    return expanded


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file, replacing one that is there; a failed write changes nothing at `path`."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # a rename may survive a power cut that its content does not
    partial.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path, ending: str = "partial") -> Iterator[Path]:
    """A new folder to fill, which is renamed to `path` where nothing is raised, else removed.

    ending: of its name until then; unique where several processes may write the same folder.

    Raises OSError where `path` is not absent or an empty folder by then.
    """
    partial = path.with_name(f"{path.name}.{ending}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
