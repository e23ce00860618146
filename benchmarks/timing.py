"""Times and operations of programs, and how a ratio of times is written."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def seconds(program: Callable, *inputs) -> float:
    """The time of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start


def spread(ratios: Sequence[float]) -> str:
    """median (least to greatest)"""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def products(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products and convolutions of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            terms = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            *terms, _ = shapes[1]  # a kernel [size, size, in, out]
            total += 2 * math.prod(terms) * math.prod(equation.outvars[0].aval.shape)
        for inner in parameters.values():
            times = parameters.get("length", 1)  # of a loop
            total += times * products(inner.jaxpr) if hasattr(inner, "jaxpr") else 0
    return total
