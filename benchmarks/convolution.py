"""The kernel's gradient of a 3×3 convolution: ours against XLA's (jdm.nn.convolution).

    python benchmarks/convolution.py [--rounds=7]

Protocol: for each shape, the gradient with respect to the kernel alone, compiled, called in turn
with XLA's. The ratio is the median, over the rounds, of XLA's time over ours in the same round,
with the least and the largest. GFLOP/s are of the medians, beside those of a product of two
2048×2048 matrices in the same rounds.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import seconds, spread

from jdm.nn import convolution

SHAPES = [  # batch, side, channels in and out
    (16, 32, 128, 128),
    (16, 32, 256, 128),
    (16, 16, 256, 256),
    (16, 8, 256, 256),
    (16, 4, 256, 256),
    (64, 28, 32, 32),
    (16, 28, 64, 64),
    (32, 8, 32, 32),
    (32, 4, 64, 64),
    (32, 8, 16, 16),
]


def gradient(conv):
    return jax.jit(lambda x, kernel, g: jax.vjp(lambda k: conv(x, k), kernel)[1](g)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    square = jnp.asarray(rng.normal(size=(2048, 2048)), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("| batch, side, channels | XLA, GFLOP/s | ours | matrix product | XLA : ours |")
    print("|---|---|---|---|---|")
    for b, side, c, d in SHAPES:
        shapes = (b, side, side, c), (3, 3, c, d), (b, side, side, d)
        inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
        calls = [
            (gradient(convolution.xla), *inputs),
            (gradient(convolution.conv3x3), *inputs),
            (product, square),
        ]
        for call in calls:
            seconds(*call)
        times = np.array([[seconds(*call) for call in calls] for _ in range(rounds)])
        work = np.array([2 * 9 * b * side**2 * c * d] * 2 + [2 * 2048**3])
        rates = work / np.median(times, axis=0) / 1e9
        ratio = spread((times[:, 0] / times[:, 1]).tolist())
        cells = [f"{b}, {side}×{side}, {c} to {d}", *(f"{rate:.0f}" for rate in rates), ratio]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
