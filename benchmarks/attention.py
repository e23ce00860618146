"""Attention: chunked against xla (jdm.nn.attention), on the shapes of the published recipes.

    python benchmarks/attention.py [--rounds=9]

Protocol: for each shape, the forward pass and the gradient of both, compiled alone and called in
turn. The ratio is the median, over the rounds, of the time of xla over that of chunked in the same
round, with the least and the largest ratio. Memory is what XLA plans for temporary arrays of the
gradient.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import seconds, spread

from jdm.nn.attention import chunked, xla

SHAPES = {  # batch, positions, heads, channels of a head
    "28 px, C 32": (16, 784, 4, 8),
    "28 px, C 64": (16, 784, 4, 16),
    "32 px, C 128, 16x16": (16, 256, 4, 64),
    "32 px, C 128, 8x8": (16, 64, 4, 64),
    "28 px, C 64, 7x7": (64, 49, 4, 32),
    "digits, 4x4": (64, 16, 4, 16),
}


def programs(attend, x):
    """The forward pass and the gradient, compiled, and the bytes of the gradient's arrays."""
    forward = jax.jit(lambda x: attend(*x)).lower(x).compile()
    gradient = jax.jit(jax.grad(lambda x: (attend(*x) ** 2).sum())).lower(x).compile()
    return forward, gradient, gradient.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("| shape [B, P, H, d] | forward, xla : chunked | gradient, xla : chunked | memory |")
    print("|---|---|---|---|")
    for name, shape in SHAPES.items():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)), jnp.float32)
        plain, in_parts = programs(xla, x), programs(chunked, x)
        cells = []
        for one, other in zip(plain[:2], in_parts[:2], strict=True):
            seconds(one, x), seconds(other, x)
            ratios = [seconds(one, x) / seconds(other, x) for _ in range(rounds)]
            cells.append(spread(ratios))
        memory = f"{plain[2] / 2**20:.0f} MiB, {in_parts[2] / 2**20:.0f} MiB"
        print(f"| {name}: {list(shape)} | {' | '.join(cells)} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
