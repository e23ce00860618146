"""Connections between process 0 of a run and the others, for `jdm.distributed`.

Process 0 listens at the run's coordinator address until all others have connected. Each process
says once what it is and what it is about to run, and process 0 answers all with the same verdict.
Then nothing listens any more, so that JAX can use the port, and the connections stay open: the
kernel closes those of a process that ends, whatever ended it, and the others notice.

A message is one line of JSON, of at most LINE bytes. Every wait has a time limit. Nothing that is
read is executed, and what is shown of it is made printable first.
"""

import contextlib
import json
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from jdm.errors import NO_VALUE, Failure, InvalidValue, first_ten
from jdm.messages import STDOUT, alert, say

LINE = 2**20  # bytes
SHOWN = 2000  # characters that are shown of another process's text
ENDED = "has ended; its own output says why"
EVERY = 5.0  # seconds between two lines of a process that waits

Facts = Mapping[str, Any]  # what all processes of a run must have in common; ready for JSON
Said = tuple[str, str]  # why a run cannot begin: who, and the rest of the sentence


def plain(text: Any, length: int = SHOWN) -> str:
    """A text of another process, as it is shown here: printable, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:length])


def named(index: int, count: int, host: str = "") -> str:
    """ "process 1 of 4 (host b)"."""
    return f"process {index} of {count}" + (f" (host {plain(host, 64)})" if host else "")


def difference(first: Facts, other: Facts) -> str:
    """ "config.seed=1 instead of 0; …": what another process has, and what process 0 has; "" where
    they agree."""
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    differing = [f"{plain(k)}={other.get(k)!r} instead of {first.get(k)!r}" for k in keys]
    return "; ".join(map(plain, first_ten(differing)))


def judged(facts: Mapping[int, Facts], hosts: Mapping[int, str]) -> Said | None:
    """Where a process differs from process 0; None where all agree.

    facts, hosts: of each process, by its number.
    """
    for index in sorted(facts):
        if differing := difference(facts[0], facts[index]):
            who = named(index, facts[0]["processes"], hosts[index])
            return who, f"differs from process 0 (host {plain(hosts[0], 64)}): {differing}"
    return None


def refuse(said: Said) -> NoReturn:
    """Raises the InvalidValue of a verdict."""
    raise InvalidValue(plain(said[0]), NO_VALUE, plain(said[1], 4 * SHOWN))


class BadMessage(OSError):
    """What has arrived is no message of jdm."""


class Link:
    """A connection to one process. name: of that process."""

    def __init__(self, connection: socket.socket, name: str = ""):
        self.socket, self.name, self._read = connection, name, b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError where the connection is lost."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message. deadline: on time.monotonic().

        Raises OSError: TimeoutError; ConnectionError where the other end is closed; BadMessage.
        """
        while b"\n" not in self._read:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self.read()
        return self.message() or {}

    def read(self) -> None:
        """Takes what has arrived; see `receive`."""
        if not (data := self.socket.recv(65536)):
            raise ConnectionError("the connection was closed")
        self._read += data
        if len(self._read) > LINE:
            raise BadMessage("the message is too long")

    def message(self) -> dict[str, Any] | None:
        """The next message that has arrived completely. Raises BadMessage."""
        line, end, rest = self._read.partition(b"\n")
        if not end:
            return None
        self._read = rest
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        return _object(found)


class Links:
    """The connections of one process: of process 0 to all others, of the others to process 0.

    address: (host, port) of process 0. timeout: in seconds, for each wait.
    """

    def __init__(self, index: int, count: int, address: tuple[str, int], timeout: float):
        self.index, self.count, self.timeout = index, count, timeout
        self._address = address
        self._hosts = {index: socket.gethostname()}
        self._links: dict[int, Link] = {}  # by the number of the process
        self._sending = threading.Lock()

    @property
    def name(self) -> str:
        return named(self.index, self.count, self._hosts[self.index])

    @property
    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def meet(self, facts: Facts) -> None:
        """Connects the processes of a run, and compares their facts; process 0 says who is there.

        Raises InvalidValue, with the same sentence in every process that has connected, where a
        process does not come, comes twice, or has other facts; and where the address cannot be
        used.
        """
        facts = json.loads(json.dumps({"processes": self.count, **facts}))  # tuples are lists there
        if self.index:
            self._join(facts)
        else:
            self._wait(facts)
        for link in self._links.values():
            _keep_alive(link.socket, self.timeout)

    def compare(self, facts: Facts, what: str) -> None:
        """Compares further facts, see `meet`. what: the facts, in the sentence about a process that
        does not send any. Raises Failure, too, where process 0 ends instead."""
        facts = json.loads(json.dumps({"processes": self.count, **facts}))
        deadline = time.monotonic() + self.timeout
        if self.index:
            try:
                self._links[0].send({"facts": facts})
                self._obey(self._links[0].receive(deadline + self.timeout))
            except OSError as error:
                why = f"has not answered: {_reason(error)}"
                raise InvalidValue(self._links[0].name, NO_VALUE, why) from None
            return
        found: dict[int, Facts] = {0: facts}
        said: Said | None = None
        for index, link in self._links.items():
            try:
                message = link.receive(deadline)
                if "said" in message:
                    said = said or (link.name, ENDED)
                else:
                    found[index] = _object(message.get("facts"))
            except TimeoutError:
                said = said or (link.name, f"has not sent {what} within {self.timeout:g} s")
            except OSError as error:
                said = said or (link.name, f"has not sent {what}: {_reason(error)}")
        self._answer(self._links.values(), said or judged(found, self._hosts))

    def watch(self, ended: Callable[[str, int], None]) -> None:
        """Calls ended(sentence, status), from a thread, when another process ends before it has
        said that it is done, or says why it ends and with which status."""
        watching = selectors.DefaultSelector()
        for link in self._links.values():
            link.socket.settimeout(self.timeout)  # of sending
            watching.register(link.socket, selectors.EVENT_READ, link)
        threading.Thread(target=self._watch, args=(watching, ended), daemon=True).start()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Sends a message to all connected processes: {"done": True}, or {"said", "status"}, why
        and with which status this process ends."""
        with self._sending:
            for link in self._links.values():
                with contextlib.suppress(OSError):  # it has ended
                    link.send(message)

    def _watch(self, watching: selectors.BaseSelector, ended: Callable[[str, int], None]) -> None:
        while watching.get_map():
            for key, _ in watching.select():
                link, gone = key.data, False
                try:
                    link.read()
                except OSError:
                    gone = True
                try:  # what it has sent before it ended comes first
                    message = link.message()
                except BadMessage:
                    message, gone = None, True
                if message is None and not gone:
                    continue
                if message is None:
                    message = {"said": f"{link.name} {ENDED}"}
                watching.unregister(link.socket)
                if message.get("done") is not True:
                    said, status = plain(message.get("said", "")), message.get("status")
                    status = status if isinstance(status, int) and 0 < status < 256 else 1
                    if self.index == 0:
                        self.tell({"said": said, "status": status})
                    ended(said, status)

    def _wait(self, facts: Facts) -> None:
        """Process 0: waits for the others, and tells them the verdict."""
        deadline, shown = time.monotonic() + self.timeout, time.monotonic()
        hellos: queue.SimpleQueue = queue.SimpleQueue()
        found: dict[int, Facts] = {0: facts}
        said: Said | None = None
        twice: list[Link] = []  # that have the number of another
        with _listener(self._address) as server:
            server.settimeout(0.2)
            while (missing := self._missing()) and not said and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    reading = (connection, deadline, hellos)
                    threading.Thread(target=_read_hello, args=reading, daemon=True).start()
                while not hellos.empty():
                    link, index, host, theirs = hellos.get()
                    if index in self._hosts:
                        both = f"hosts {plain(self._hosts[index], 64)} and {plain(host, 64)}"
                        said = (f"process {index}", f"is the number of two processes, on {both}")
                        twice.append(link)
                        continue
                    link.name = named(index, self.count, host)
                    self._links[index], self._hosts[index], found[index] = link, host, theirs
                    said = said or judged(found, self._hosts) if index >= self.count else said
                if time.monotonic() - shown >= EVERY:
                    shown, left = time.monotonic(), deadline - time.monotonic()
                    there = f"{self.count - len(missing)} of {self.count} processes are there"
                    say(f"waiting at {self._where}: {there}; {_list(missing)}, {left:.0f} s left")
        if missing and not said:
            which = "processes" if len(missing) > 1 else "process"
            numbers = ", ".join(first_ten([str(i) for i in missing]))
            have = "have" if len(missing) > 1 else "has"
            late = f"{have} not connected to {self._where} within {self.timeout:g} s"
            said = (f"{which} {numbers} of {self.count}", late)
        self._answer([*self._links.values(), *twice], said or judged(found, self._hosts))
        all_there = [f"{i} on {plain(self._hosts[i], 64)}" for i in sorted(self._hosts)]
        say(f"{self.count} processes are connected: {', '.join(first_ten(all_there))}", STDOUT)

    def _missing(self) -> list[int]:
        return [i for i in range(1, self.count) if i not in self._links]

    def _answer(self, links: Iterable[Link], said: Said | None) -> None:
        """Process 0: tells the verdict, and raises it."""
        for link in links:
            with contextlib.suppress(OSError):
                link.socket.settimeout(self.timeout)
                link.send({"verdict": said, "host": self._hosts[0]})
        if said:
            refuse(said)

    def _obey(self, answer: dict[str, Any]) -> None:
        """Another process: raises the verdict, where it is not None, or Failure where process 0 has
        ended instead."""
        if "said" in answer:
            raise Failure(plain(answer["said"]))
        if (said := answer["verdict"] if "verdict" in answer else ("?", "?")) is not None:
            if not (isinstance(said, list) and len(said) == 2):
                raise BadMessage("its answer is no verdict")
            refuse((said[0], said[1]))

    def _join(self, facts: Facts) -> None:
        """Another process: connects to process 0, and waits for its verdict."""
        deadline, shown = time.monotonic() + self.timeout, time.monotonic()
        hello = {"jdm": "hello", "process": self.index, "host": self._hosts[self.index]}
        zero = named(0, self.count)
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                link = Link(socket.create_connection(self._address, timeout=min(left, EVERY)))
                link.send(hello | {"facts": facts})
                # The time of process 0 may have begun later.
                answer = link.receive(time.monotonic() + self.timeout + EVERY)
                self._obey(answer)
                host = plain(answer.get("host", ""), 64)
                self._hosts[0], link.name = host, named(0, self.count, host)
                self._links[0] = link
                return
            except BadMessage as error:
                allowed = f"is the address of something that is no process 0 of jdm ({error})"
                raise InvalidValue("coordinator", self._where, allowed) from None
            except OSError as error:
                why = _reason(error)
            now = time.monotonic()
            if now >= deadline:
                allowed = f"cannot be reached within {self.timeout:g} s: {why}"
                hint = f"is {zero} running there?"
                raise InvalidValue("coordinator", self._where, allowed, hint)
            if now - shown >= EVERY:
                shown, left = now, deadline - now
                alert(f"waiting for {zero} at {self._where} ({why}), {left:.0f} s left")
            time.sleep(0.3)


def _list(missing: list[int]) -> str:
    return f"missing: {', '.join(first_ten([str(i) for i in missing]))}"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return plain(getattr(error, "strerror", None) or error)


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise BadMessage("the message is no JSON object")
    return found


def _listener(address: tuple[str, int]) -> socket.socket:
    """A socket that listens at the port on all addresses of this machine, as JAX does after it.

    Raises InvalidValue where that is not possible.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", address[1]), family=family, dualstack_ipv6=both)
    except OSError as error:
        where, said = f"{address[0]}:{address[1]}", f"cannot be listened at: {error.strerror}"
        hint = "another job may use the port; choose another one, in all processes"
        raise InvalidValue("coordinator", where, said, hint) from None


def _read_hello(connection: socket.socket, deadline: float, hellos: queue.SimpleQueue) -> None:
    """Puts (link, number, host, facts) of a process that has connected; closes what is none."""
    link = Link(connection)
    try:
        hello = link.receive(deadline)
        index, host, facts = hello.get("process"), hello.get("host"), hello.get("facts")
        if hello.get("jdm") != "hello" or not isinstance(index, int) or not 0 <= index < 2**20:
            raise BadMessage("it is no process of jdm")
        hellos.put((link, index, str(host), _object(facts)))
    except OSError:
        connection.close()


def _keep_alive(connection: socket.socket, timeout: float) -> None:
    """Lets the kernel find out within the time-out that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {"TCP_KEEPIDLE": timeout / 2, "TCP_KEEPINTVL": timeout / 8, "TCP_KEEPCNT": 4}
    for name, value in settings.items():
        if hasattr(socket, name):  # not on every system
            option = getattr(socket, name)
            connection.setsockopt(socket.IPPROTO_TCP, option, min(max(int(value), 1), 32767))
