"""The platform that programs are compiled for.

It decides between implementations of one function, such as attention. It is that of JAX's default
device, but for programs that are compiled for devices which are not here (jdm.analysis.plan).
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """Such as "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """The programs that are traced within are for this platform. A function that was traced for
    another one before, with the same shapes, is not traced again: use a process of its own."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)
