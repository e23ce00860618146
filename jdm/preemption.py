"""SIGTERM during a training run: a checkpoint is saved before it ends.

Owns the handler of SIGTERM, and when all processes of a run stop: the trainer asks `reached` after
each step. Launchers and clusters send SIGTERM some time before they kill: Cloud TPU before a spot
machine is taken away, SLURM before a job is preempted, Kubernetes before a pod is deleted.

    with preemption.watched() as notice:          ended here by SIGTERM: at once, and it is said
        notice.begin()
        for step in ...:                          here: after a step
            if notice.reached(step): ...          in all processes at the same step

Of several processes any may get the signal, or all. JAX's preemption service finds a step that none
of them has gone beyond. It reads SIGTERM by a handler of its own, which would swallow a second one
and those before the first step, so it gets the signal from here.

A signal reaches Python code only between two of its instructions, and a compilation is one. So a
thread waits at a pipe into which Python's own handler, in C, writes each signal that arrives.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import jax
from jax._src.distributed import global_state  # there is no public name for a later start
from jax.experimental import multihost_utils

from jdm import distributed
from jdm.distributed import PREEMPTED
from jdm.messages import alert


def _jax_reads_sigterm() -> bool:
    """Whether a script has started JAX's preemption service, as `jax.distributed.initialize` does
    where its flags are not changed."""
    return global_state.preemption_sync_manager is not None


def _start_service() -> Callable[[], None]:
    """Starts JAX's service, in all processes. Returns the function that gives notice to all of
    them, which takes about a second. The handler of SIGTERM stays as it is."""
    # JAX takes notice by a handler in C++, which Python can neither call nor replace by the one
    # before.
    libc, number = ctypes.CDLL(None), signal.SIGTERM
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    ours = libc.signal(number, None)
    libc.signal(number, ours)
    jax.config.update("jax_enable_preemption_service", True)
    try:
        global_state.initialize_preemption_sync_manager()
    finally:
        jax.config.update("jax_enable_preemption_service", False)
        theirs = libc.signal(number, ours)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)
    return lambda: handler(number)


class Notice:
    """Whether a run is to stop. This one is given by nobody, or by JAX alone, in a script that has
    started JAX's preemption service itself."""

    def begin(self) -> None:
        """The first step comes next: from now on a checkpoint can be saved."""

    def reached(self, step: int) -> bool:
        """Whether to save a checkpoint now, after `step`, and to stop. All processes of a run ask
        after every step, and all are told so at the same one."""
        return _jax_reads_sigterm() and multihost_utils.reached_preemption_sync_point(step)


class _Watched(Notice):
    """A notice that SIGTERM gives."""

    def __init__(self) -> None:
        self._given = threading.Event()
        self._give: Callable[[], None] | None = None  # None: SIGTERM ends this process at once

    def begin(self) -> None:
        several = distributed.count() > 1
        self._give = _start_service() if several else lambda: None

    def reached(self, step: int) -> bool:
        return super().reached(step) if distributed.count() > 1 else self._given.is_set()

    def arrived(self) -> None:
        """SIGTERM has arrived. Called in a thread of its own."""
        if self._give and not self._given.is_set():
            self._given.set()
            self._give()
            alert("SIGTERM: a checkpoint is saved after this step; a second SIGTERM ends at once")
        elif self._give:
            distributed.leave("ended by a second SIGTERM", PREEMPTED)
        else:
            distributed.leave("ended by SIGTERM, before the first step", PREEMPTED)


@contextlib.contextmanager
def watched() -> Iterator[Notice]:
    """The notice that SIGTERM gives while the context lasts; its handler is restored afterwards.

    Only the main thread can have a handler. In another one SIGTERM does what it did before.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    # None: a handler that Python cannot restore.
    if not main or previous is None or _jax_reads_sigterm():
        yield Notice()
        return
    notice, (ours, theirs) = _Watched(), socket.socketpair()
    theirs.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # Python's handler in C has written it by then
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while arrived := ours.recv(64):
            if before >= 0:  # of an event loop, say
                with contextlib.suppress(OSError):
                    os.write(before, arrived)
            for _ in range(arrived.count(signal.SIGTERM)):
                notice.arrived()

    waiting = threading.Thread(target=wait, name="jdm-sigterm", daemon=True)
    waiting.start()
    try:
        yield notice
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, previous)
        theirs.close()
        waiting.join()
        ours.close()
