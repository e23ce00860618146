"""Files and folders that appear whole or not at all: written beside, then renamed. And where the
user's own folders are."""

import contextlib
import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path


def home() -> Path | None:
    """The user's home folder; None where there is none. An empty $HOME, like every variable of the
    environment that jdm reads, counts as not set."""
    try:
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a container may run under a number that is no user's
        return None


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
