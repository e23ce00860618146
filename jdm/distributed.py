"""Runs of several processes: how they find each other, who writes, and how they agree.

Owns `jax.distributed`, and the numbers of processes: no other module asks JAX for them. A run of
one process is the special case in which nothing waits. Imports JAX only where it is needed, so that
a command can check its flags first.

    with distributed.joined(processes, facts):     the other processes run the same lines
        if distributed.is_main(): ...              process 0 writes
        distributed.barrier("it is written")       all go on together

Before JAX starts, the processes compare what must not differ between them, and then their devices.
With a given coordinator they do so over `jdm.connections`, which also tell when another process has
ended; on a cluster that JAX finds by itself, through JAX's own store of keys and values.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jdm
from jdm.connections import Facts, Links, judged, named, refuse
from jdm.errors import NO_VALUE, Failure, InvalidValue
from jdm.messages import alert, only_alerts
from jdm.options import NOT_NEGATIVE, POSITIVE, TEXT, WHOLE, check_fields, declared, options_of

GRACE = 10.0  # seconds: how long a failed computation waits for the news that a process has ended

# The exit status after SIGTERM, with a checkpoint (see jdm.preemption) or without: that of a shell
# for a process that SIGTERM ends. To a launcher all are one case: the same command goes on.
PREEMPTED = 143


class Preempted(Failure):
    """A run has saved a checkpoint and stopped before its last step, since SIGTERM has arrived. All
    processes of a run raise it after the same step."""

    status = PREEMPTED


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, as the flags of a command say. Raises InvalidValue for values that
    are not allowed, or do not go together."""

    distributed: bool = declared(
        False, "one of several processes, which JAX finds by itself (Cloud TPU, SLURM, GKE)"
    )
    coordinator: str | None = declared(
        None,
        "host:port of process 0, such as 10.0.0.2:8476, for processes that are started by hand",
        kind=TEXT,
        unset="not given",
    )
    processes: int | None = declared(
        None, "the number of processes", POSITIVE, kind=WHOLE, unset="not given"
    )
    process: int | None = declared(
        None, "the number of this process, from 0", NOT_NEGATIVE, kind=WHOLE, unset="not given"
    )
    timeout: int = declared(
        120,
        "seconds to wait for the other processes, and until a silent one counts as ended",
        POSITIVE,
    )

    def __post_init__(self):
        check_fields(self)
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process")}
        for name, value in given.items():
            others = [other for other in given if other != name and given[other] is None]
            if value is not None and others:
                needs = f"needs --{' and --'.join(others)} too"
                raise InvalidValue(name, value, needs)
        if self.coordinator is not None:
            self.address  # noqa: B018  raises
        elif not self.distributed and self.timeout != OPTIONS["timeout"].default:
            allowed = "goes with --distributed or --coordinator"
            raise InvalidValue("timeout", self.timeout, allowed)
        if self.process is not None and self.processes and self.process >= self.processes:
            allowed = f"must be below --processes={self.processes}: they are counted from 0"
            raise InvalidValue("process", self.process, allowed)

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) of the coordinator."""
        found = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:]+):(\d{1,5})", self.coordinator or "")
        if not found or not 0 < int(found[2]) < 2**16:
            allowed = "must be host:port, with a port from 1 to 65535, such as 10.0.0.2:8476"
            raise InvalidValue("coordinator", self.coordinator, allowed)
        return found[1].strip("[]"), int(found[2])


OPTIONS = options_of(Processes)


_alone = False  # whether process 0 is in `only_main`


def index() -> int:
    """The number of this process, from 0."""
    import jax

    return 0 if _alone else jax.process_index()


def count() -> int:
    """The number of processes of this run."""
    import jax

    return 1 if _alone else jax.process_count()


@contextlib.contextmanager
def only_main() -> Iterator[None]:
    """Process 0 calls this, and what is inside, without the others: it counts as the only one, so
    that nothing waits, such as a checkpoint that is saved or loaded."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_main() -> bool:
    """Whether this is process 0, which writes the files that a run has once."""
    return index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here. name: the same in all of them."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jdm.{name}")


def from_main(tree: Any) -> Any:
    """A number, an array or a tree of arrays of process 0, in all processes, as NumPy arrays, bit
    by bit. All call this together, with the same structure, shapes and dtypes."""
    import jax
    import numpy as np  # not above: `jdm --help` would wait for it

    arrays, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    if count() > 1:
        from jax.experimental import multihost_utils

        content = b"".join(array.tobytes() for array in arrays)
        # As whole numbers of 32 bits: JAX would round a float64, and make these of smaller ones.
        words = np.frombuffer(content + bytes(-len(content) % 4), np.uint32)
        sent, at = np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes(), 0
        for i, array in enumerate(arrays):
            found = np.frombuffer(sent, array.dtype, array.size, at)
            arrays[i], at = found.reshape(array.shape), at + array.nbytes
    return jax.tree.unflatten(structure, arrays)


def same_as_main(content: bytes) -> bool:
    """Whether process 0 has the same bytes; it says so of its own. All call this together."""
    import numpy as np

    mine = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    return bool((mine == from_main(mine)).all())


def gathered(array: Any) -> Any:
    """The arrays of all processes, [processes, …], bit by bit. All call this together, with the
    same shape and dtype."""
    import numpy as np
    from jax.experimental import multihost_utils

    raw = np.frombuffer(np.asarray(array).tobytes(), np.uint8)  # JAX would round a float64
    sent = np.asarray(multihost_utils.process_allgather(raw))
    return np.frombuffer(sent.tobytes(), array.dtype).reshape(count(), *array.shape)


def leave(sentence: str, status: int) -> None:
    """Ends this process at once, from any thread; says why, here and in the others, which end
    too."""
    if _run:
        _run.leave(sentence, status)
    alert(f"jdm: {sentence}")
    _leave(status)


@contextlib.contextmanager
def joined(processes: Processes, facts: Facts) -> Iterator[None]:
    """Makes this process one of a run, if the flags say so.

    facts: what must be the same in all processes, beside the versions of jdm and JAX and the
    devices; ready for JSON. Where this process ends with an error, the others are told, and end
    with its sentence and status; where another one ends, so does this one.

    Raises InvalidValue where the flags do not fit what is there, where a process does not come, and
    for facts that differ, in every process; Failure where JAX cannot connect the processes.
    """
    if not processes.distributed and processes.coordinator is None:
        yield
        return
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    facts = {"jdm": jdm.__version__, **versions, **facts}
    global _run
    run = _run = _Given(processes) if processes.coordinator else _Found(processes)
    stopped = None
    with run.ending():
        run.join(facts)
        try:
            yield
        except Preempted as error:  # in all processes: they end together
            stopped = error
        barrier("all processes are done")
    if stopped:
        raise stopped


class _Run:
    """This process as one of several."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.links: Links | None = None  # to the other processes, where jdm connects them
        self._ends, self._started = threading.Lock(), False

    def join(self, facts: Facts) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around the whole run: how this process ends, and what the others hear of it."""
        try:
            yield
        except BaseException as error:
            if self._started:
                self._fail(error)
            raise
        import jax

        with self._ends:
            if self.links:
                self.links.tell({"done": True})
        jax.distributed.shutdown()

    def initialise(self, **given: Any) -> None:
        """Starts JAX's connection of the processes."""
        import jax

        seconds = self.processes.timeout
        limits: dict[str, Any] = dict(
            initialization_timeout=seconds, shutdown_timeout_seconds=seconds
        )
        # With links, those tell first, in one sentence; JAX notices a process that hangs, too.
        limits["heartbeat_timeout_seconds"] = max(10, seconds + (10 if self.links else 0))
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It takes SIGTERM for a notice. Where nothing reads it, as in sampling, the process would
        # not end. Training starts the service later.
        jax.config.update("jax_enable_preemption_service", False)
        self._started = True
        try:
            jax.distributed.initialize(**given, **limits)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise Failure(f"the processes could not connect: {reason}") from error

    def leave(self, sentence: str, status: int) -> None:
        """Tells the others that this process ends at once, and why."""
        self._ends.acquire(timeout=1)  # for good, as in `_fail`, which may hold it
        if self.links:
            self.links.tell({"said": f"{self.links.name}: {sentence}", "status": status})

    def _fail(self, error: BaseException) -> None:
        """This process ends with an error: it tells the others, and does not wait for them."""
        import jax

        if self.links and isinstance(error, jax.errors.JaxRuntimeError):
            # A collective fails where another process has ended: `_ended` says it better.
            threading.Event().wait(GRACE)
        self._ends.acquire()  # for good: what other processes say now is not printed any more
        status = 2 if isinstance(error, InvalidValue) else 1
        if self.links:
            text = " ".join(str(error).split()) or type(error).__name__
            self.links.tell({"said": f"{self.links.name}: {text}", "status": status})
        # JAX's own end waits for all processes. This comes before it, and after Python has printed
        # the error.
        atexit.register(_leave, status)

    def _ended(self, sentence: str, status: int) -> None:
        """Another process has ended: so does this one, whatever it is computing."""
        with self._ends:
            alert(f"jdm: {sentence}")
            _leave(status)


def _leave(status: int) -> None:
    """Ends this process at once, with its workers."""
    if workers := sys.modules.get("multiprocessing"):  # not imported here: JAX is about to abort
        for worker in workers.active_children():
            worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


_run: _Run | None = None  # that this process has joined


class _Given(_Run):
    """The flags say where process 0 is."""

    def join(self, facts: Facts) -> None:
        flags = self.processes
        number, total = flags.process or 0, flags.processes or 1
        if number:
            only_alerts(named(number, total))
        links = Links(number, total, flags.address, float(flags.timeout))
        links.meet(facts)
        self.links = links
        self.initialise(
            coordinator_address=flags.coordinator, num_processes=total, process_id=number
        )
        links.compare({"devices": _devices()}, "the names of its devices")
        links.watch(self._ended)


class _Found(_Run):
    """JAX knows the cluster."""

    def join(self, facts: Facts) -> None:
        try:
            self.initialise()
        except Failure as error:
            if isinstance(error.__cause__, ValueError):  # the coordinator is not defined
                self._started = False
                said = "finds no Cloud TPU, SLURM or GKE here"
                hint = "processes that are started by hand need --coordinator"
                raise InvalidValue("distributed", NO_VALUE, said, hint) from None
            raise
        # JAX has no public name for its store, nor for the number of a process before its devices
        # have started; Orbax uses the same name.
        from jax._src.distributed import global_state

        number, total = global_state.process_id, global_state.num_processes
        if number:
            only_alerts(named(number, total))
        compare = (global_state.client, number, total, float(self.processes.timeout))
        _compare_in_store("facts", facts, *compare)
        _compare_in_store("devices", {"devices": _devices()}, *compare)


def _devices() -> str:
    """ "2 × cpu": the devices of this process."""
    import jax

    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        raise Failure(f"JAX cannot start its devices: {str(error).splitlines()[0]}") from error
    return f"{len(devices)} × {devices[0].device_kind}"


def _compare_in_store(
    what: str, facts: Facts, client: Any, number: int, total: int, timeout: float
) -> None:
    """As Links.compare, through JAX's store of keys and values."""
    import jax

    def get(name: Any) -> Any:
        return json.loads(client.blocking_key_value_get(f"jdm/{what}/{name}", int(timeout * 1000)))

    mine = {"host": socket.gethostname(), "facts": {"processes": total, **facts}}
    client.key_value_set(f"jdm/{what}/{number}", json.dumps(mine))
    waited_for = 0
    try:
        if number == 0:
            found: dict[int, Mapping[str, Any]] = {}
            for waited_for in range(total):
                found[waited_for] = get(waited_for)
            said = judged(*({i: one[k] for i, one in found.items()} for k in ("facts", "host")))
            client.key_value_set(f"jdm/{what}/said", json.dumps(said))
        said = get("said")
    except RuntimeError:  # of JAX, for a time-out
        late = f"has not sent its {what} within {timeout:g} s"
        raise InvalidValue(named(waited_for, total), NO_VALUE, late) from None
    if said:
        jax.distributed.shutdown()  # waits until all have read it
        refuse((said[0], said[1]))
