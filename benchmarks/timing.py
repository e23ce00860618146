"""Times of programs, and how a ratio of times is written."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax


def seconds(program: Callable, *inputs) -> float:
    """The time of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start


def spread(ratios: Sequence[float]) -> str:
    """median (least to greatest)"""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
