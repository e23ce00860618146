"""A 3×3 convolution and its derivatives: ours against XLA's (jdm.nn.convolution).

    python benchmarks/convolution.py [--rounds=7]

Protocol: for each shape, the convolution, its derivative with respect to the input and that with
respect to the kernel, each compiled alone, called in turn with XLA's. A ratio is the median, over
the rounds, of XLA's time over ours in the same round, with the least and the largest: above 1, ours
is faster. GFLOP/s are ours, of the medians, beside those of a product of two 2048×2048 matrices in
the same rounds. Memory is kept (jdm.startup).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import seconds, spread

from jdm import startup
from jdm.nn import convolution

SHAPES = [  # batch, side, channels in and out
    (16, 32, 128, 128),
    (16, 32, 256, 128),
    (16, 16, 256, 256),
    (16, 8, 256, 256),
    (16, 4, 256, 256),
    (64, 28, 32, 32),
    (16, 28, 64, 64),
    (64, 8, 32, 32),
    (64, 4, 64, 64),
    (32, 8, 16, 16),
]
PARTS = ("convolution", "input", "kernel")


def programs(conv, x, kernel, g):
    """{part: a call of its compiled program}"""
    calls = {
        "convolution": (lambda x, kernel, g: conv(x, kernel)),
        "input": (lambda x, kernel, g: jax.vjp(lambda x: conv(x, kernel), x)[1](g)[0]),
        "kernel": (lambda x, kernel, g: jax.vjp(lambda k: conv(x, k), kernel)[1](g)[0]),
    }
    return {part: (jax.jit(call), x, kernel, g) for part, call in calls.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    startup.keep_memory()
    rng = np.random.default_rng(0)
    square = jnp.asarray(rng.normal(size=(2048, 2048)), jnp.float32)
    product = (jax.jit(lambda a: a @ a), square)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    heads = [f"{part}, GFLOP/s | XLA : ours" for part in PARTS]
    print(f"| batch, side, channels | {' | '.join(heads)} | matrix product |")
    print(f"|{'---|' * 8}")
    for b, side, c, d in SHAPES:
        shapes = (b, side, side, c), (3, 3, c, d), (b, side, side, d)
        given = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
        theirs = programs(convolution.xla, *given)
        ours = programs(convolution.conv3x3, *given)
        calls = [product, *(call[part] for part in PARTS for call in (theirs, ours))]
        for call in calls:
            seconds(*call)
        times = np.array([[seconds(*call) for call in calls] for _ in range(rounds)])
        work = 2 * 9 * b * side**2 * c * d / 1e9
        cells = [f"{b}, {side}×{side}, {c} to {d}"]
        for i in range(1, len(calls), 2):
            cells.append(f"{work / np.median(times[:, i + 1]):.0f}")
            cells.append(spread((times[:, i] / times[:, i + 1]).tolist()))
        cells.append(f"{2 * 2048**3 / 1e9 / np.median(times[:, 0]):.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
