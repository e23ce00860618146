"""One job at a time in a folder of a bucket, where no kernel keeps locks.

A job that trains writes an object there, and writes it again every BEAT seconds, each time only if
nobody else has written it since. So the object of a job that was killed, with its machine or
without, stays as it is: a new job waits STALE seconds to see that, and takes it over. No clocks are
compared, and nobody has to delete anything. A job that was suspended, and whose object was taken
over, is told so when it next asks. What it writes until then is not held back: a checkpoint that it
damages is known by its checksums.
"""

import contextlib
import datetime
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jdm.errors import Failure, InvalidValue
from jdm.messages import STDOUT, say

BEAT, STALE = 10.0, 45.0  # seconds
ANSWER = 60.0  # seconds: how long the bucket may take to answer


@contextlib.contextmanager
def held(folder: str, name: str) -> Iterator["Lease"]:
    """Holds the object `name` in a folder, gs://bucket/path, against other jobs.

    Raises InvalidValue where another job holds it, and where the bucket does not exist or may not
    be written; Failure where it cannot be reached.
    """
    lease = Lease(folder, name)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


class Lease:
    """See `held`."""

    def __init__(self, folder: str, name: str):
        import tensorstore  # not above: commands check their flags first

        bucket, _, path = folder.removeprefix("gs://").partition("/")
        self._folder, self._name, self._taken_by = folder, name, ""
        # Of the clients at hand, tensorstore is the one that writes under a condition.
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
        self._store = tensorstore.KvStore.open(spec).result()
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        said = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        self._content = f"{said}\n{_machine()} {os.getpid()}\n".encode()
        self._generation = b""  # of the object as this job has written it
        self._ended, self._renewing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Writes the object; see `held`."""
        generation, content = self._read()
        if content and not _has_ended(content):
            generation = self._watched(generation, content)
        if not self._write(self._content, generation):
            self._refuse(self._read()[1])
        self._thread.start()

    def release(self) -> None:
        """Deletes the object, if it is that of this job still."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Failure, InvalidValue):  # the next job waits, and takes it over
            self._write(None, self._generation)

    def check(self) -> None:
        """Asks now, and raises Failure where another job has taken over: this one must not write.
        Raises Failure where the bucket cannot be reached, too."""
        self._renew()
        if self._taken_by:
            said = f"another job ({self._taken_by}) has taken over {self._folder}"
            raise Failure(f"{said}, since this one was silent for more than {STALE:g} s")

    def _watched(self, generation: bytes, content: bytes) -> bytes:
        """The generation of the object of another job, when it has not changed for STALE seconds,
        or was deleted. Raises InvalidValue where it changes."""
        holder = _holder(content)
        say(f"{self._folder} was held by {holder}; waiting {STALE:g} s to see if it ended", STDOUT)
        until = time.monotonic() + STALE
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, BEAT / 4))
            found, content = self._read()
            if not content:
                return found
            if found != generation:
                self._refuse(content)
        return generation

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Failure, InvalidValue):  # the next one may arrive
                self._renew()

    def _renew(self) -> None:
        """Writes the object again; finds out whether another job has written it since."""
        with self._renewing:
            if self._taken_by or self._write(self._content, self._generation):
                return
            generation, content = self._read()
            if content == self._content:  # this job has, and the answer was lost
                self._generation = generation
            else:
                self._taken_by = _holder(content) if content else "which has ended"

    def _read(self) -> tuple[bytes, bytes]:
        """(generation, content) of the object; b"" where there is none."""
        found = self._answer(self._store.read(self._name))
        return found.stamp.generation, found.value

    def _write(self, content: bytes | None, generation: bytes) -> bool:
        """Whether the object was of that generation, and is now `content`; None deletes it."""
        stamp = self._answer(self._store.write(self._name, content, if_equal=generation))
        self._generation = stamp.generation or self._generation
        return bool(stamp.generation)

    def _answer(self, future: Any) -> Any:
        try:
            return future.result(timeout=ANSWER)
        except Exception as error:  # tensorstore has no types of its own
            text = " ".join(str(error).split())
        bucket = self._folder.removeprefix("gs://").partition("/")[0]
        if text.startswith("NOT_FOUND"):
            raise InvalidValue("workdir", self._folder, f"is in no bucket: {bucket} does not exist")
        if text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            said = re.search(r'\\"message\\": *\\"(.*?)\\"', text)
            why = f" ({said[1]})" if said else ""
            allowed = f"may not be written with the credentials at hand{why}"
            raise InvalidValue("workdir", self._folder, allowed)
        raise Failure(f"{self._folder}/{self._name} cannot be reached: {text or 'no answer'}")

    def _refuse(self, content: bytes) -> NoReturn:
        allowed = f"is in use by another job ({_holder(content)})"
        raise InvalidValue("workdir", self._folder, allowed, "choose another folder")


def _holder(content: bytes) -> str:
    """Who has written the object, for people."""
    return content[:200].decode(errors="replace").partition("\n")[0].strip() or "unknown"


def _machine() -> str:
    """What the processes have in common that see each other's numbers; "" where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _has_ended(content: bytes) -> bool:
    """Whether the object is that of a process of this machine that is no more."""
    found = re.fullmatch(r"[^\n]*\n(\S+) (\d+)\n", content.decode(errors="replace"))
    if not found or found[1] != _machine():
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return int(found[2]) == os.getpid()
