"""What evaluation costs beside the network, and how near an estimate of the bound is.

    python benchmarks/evaluate.py [--images=10000] [--batch_size=256] [--rounds=5]
    python benchmarks/evaluate.py --bound [--images=360] [--steps=20,50]

The first form times the evaluator `classification` on random 28×28 images against the forward
passes alone: the logits of the same batches, as floats that are on the device already. The network
is that of the config `mnist` with random weights. The two take turns, and each ratio is of the two
times of one round.

The second form gives the variational bound of the packaged digits model on the test split: exact,
at all T noise levels, and estimated at some of them.
"""

import argparse
import statistics
import time

import numpy as np
from timing import seconds, spread

import jdm
from jdm import startup


def speed(images: int, batch_size: int, rounds: int) -> None:
    import jax
    import jax.numpy as jnp

    from jdm.analysis.evaluators import EvaluationOptions, evaluate
    from jdm.config import load_config
    from jdm.data.splits import Split
    from jdm.diffusion.process import Diffusion, pixels_to_float
    from jdm.joint import Joint, logits_of
    from jdm.nn.model import make_model, weight_shapes

    config, rng = load_config("mnist"), np.random.default_rng(0)
    model = make_model(config.model, config.exec)
    shapes = {"batch_stats": {}, **weight_shapes(model)}
    weights = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), s.dtype), shapes)
    joint = Joint(config, model, Diffusion(**config.diffusion), weights)
    pixels = rng.integers(0, 256, (images, *joint.image_shape)).astype(np.uint8)
    labels = rng.integers(0, config.model.num_classes, images).astype(np.int32)
    split, options = Split(pixels, labels, "test"), EvaluationOptions(batch_size)
    padded = np.pad(pixels, ((0, -images % batch_size), (0, 0), (0, 0), (0, 0)))
    on_device = [
        pixels_to_float(jnp.asarray(padded[start : start + batch_size]))
        for start in range(0, images, batch_size)
    ]
    t = jnp.zeros(batch_size, jnp.int32)

    def forward():
        for x in on_device:
            logits_of(model, weights, x, t).block_until_ready()

    def evaluator():
        return dict(evaluate(joint, ["classification"], split, options))["accuracy"]

    logits_of(model, weights, on_device[0], t).block_until_ready()
    evaluator()  # everything is compiled and imported now
    times = [(seconds(forward), seconds(evaluator)) for _ in range(rounds)]
    alone, whole = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{images:,} images of 28×28 in batches of {batch_size}, {jax.devices()[0].device_kind}")
    print(f"forward passes alone {alone:.2f} s, classification {whole:.2f} s")
    print(f"ratio {spread([b / a for a, b in times])}")


def bound(images: int, steps: list[int], batch_size: int) -> None:
    from jdm.analysis.evaluators.likelihood import image_bounds
    from jdm.data.splits import load_split

    joint, pixels = jdm.load("digits"), load_split("digits", "test").images[:images]
    print("| noise levels | bits per dimension | standard error | to exact | seconds |")
    print("|---|---|---|---|---|")
    exact = None
    for count in (joint.diffusion.steps, *steps):
        start = time.perf_counter()
        bits = image_bounds(joint, pixels, count, batch_size=batch_size).per_image
        taken, mean = time.perf_counter() - start, bits.mean()
        exact = mean if exact is None else exact
        error, off = bits.std(ddof=1) / len(bits) ** 0.5, mean / exact - 1
        print(f"| {count} | {mean:.3f} | {error:.3f} | {off:+.2%} | {taken:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bound", action="store_true", help="the bound instead of the speed")
    parser.add_argument("--images", type=int, help="10000, or 360 for the bound")
    parser.add_argument("--batch_size", type=int, help="256, or all images for the bound")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", default="20,50", help="noise levels of the estimates")
    arguments = parser.parse_args()
    startup.set_up()
    if arguments.bound:
        images = arguments.images or 360
        steps = [int(part) for part in arguments.steps.split(",")]
        return bound(images, steps, arguments.batch_size or images)
    speed(arguments.images or 10_000, arguments.batch_size or 256, arguments.rounds)


if __name__ == "__main__":
    main()
