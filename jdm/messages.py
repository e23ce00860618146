"""Lines about the progress of a run, which never end it.

Where the output is closed, full or gone, or cannot show a character, the line is lost or shows an
escape, and the run goes on. A command whose result is text, such as `jdm data list`, prints that
with `print`: to lose a result is an error. Of several processes of a run one prints lines of
progress, and all print warnings and errors.
"""

import contextlib
import os
import select
import sys
from typing import Any


class Output:
    """sys.stdout or sys.stderr, by name; what cannot be written to it is dropped.

    always: whether it is used by every process of a run, see `only_alerts`.
    """

    def __init__(self, name: str, always: bool = False):
        self._name, self._always = name, always

    def __getattr__(self, name: str) -> Any:  # encoding, fileno: for tqdm
        return getattr(getattr(sys, self._name), name)

    def isatty(self) -> bool:
        if _process and not self._always:
            return False
        with contextlib.suppress(AttributeError, ValueError):  # there is none, or it was closed
            return getattr(sys, self._name).isatty()
        return False

    def write(self, text: str) -> None:
        if _process and not self._always:
            return
        with self._whatever_happens() as stream:
            encoding = stream.encoding or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        with self._whatever_happens() as stream:
            stream.flush()

    @contextlib.contextmanager
    def _whatever_happens(self):
        stream = getattr(sys, self._name)
        try:
            yield stream
        except BrokenPipeError:
            discard(stream)
        except (AttributeError, OSError, ValueError):  # there is none, it is full, or it was closed
            pass


STDOUT, STDERR, ALERTS = Output("stdout"), Output("stderr"), Output("stderr", always=True)
_process = ""  # the name of this process, where another one prints the lines of progress


def only_alerts(process: str) -> None:
    """From now on this process prints warnings and errors alone, each after its name."""
    global _process
    _process = process


def say(line: str, output: Output = STDERR) -> None:
    """Prints a line, if that is possible."""
    output.write(f"{line}\n")
    output.flush()


def alert(line: str) -> None:
    """Prints a warning or an error, if that is possible, in every process of a run."""
    say(f"{_process}: {line}" if _process else line, ALERTS)


def discard(stream: Any) -> None:
    """Leads a stream that nobody reads any more to nowhere, so that Python can flush it at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream without a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def nobody_reads(stream: Any) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream without a file
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always reported
        return bool(poll.poll(0))
    return False


def open_missing() -> None:
    """Opens the standard streams that are closed (2>&-) to nowhere, and lets them escape characters
    that they cannot show. Otherwise the next file that is opened would take a stream's number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
