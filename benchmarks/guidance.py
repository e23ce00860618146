"""The cost of guidance: time and memory of a guided estimate of the noise and an unguided one.

    python benchmarks/guidance.py --checkpoint=digits
    python benchmarks/guidance.py --config=mnist

Protocol. One call of the eps_fn on a batch (--batch, default 64) at a middle t, compiled alone.
With --config the network is newly initialised, which costs the same. The guidances take turns for
--rounds rounds, and a ratio is the median, over the rounds, of the time in a round over that of no
guidance in the same round, with the least and the largest. Memory is the compiled program's own
account of what it takes beside its arguments: that of one estimate, and so of a sampler of any
steps.
"""

import argparse
import json
import statistics

import numpy as np

from jdm import startup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="digits", help="a work folder, or digits")
    parser.add_argument("--config", help="a config instead, for a network that is not trained")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    startup.set_up()
    import jax
    from timing import seconds, spread

    from jdm.config import load_config
    from jdm.diffusion.guidance import GUIDANCE, guide
    from jdm.diffusion.method import Method
    from jdm.diffusion.process import Diffusion
    from jdm.joint import load, make_network
    from jdm.nn.model import make_model

    if arguments.config:
        config = load_config(arguments.config)
        model, diffusion = make_model(config.model, config.exec), Diffusion(**config.diffusion)
    else:
        joint = load(arguments.checkpoint)
        model, diffusion, weights = joint.model, joint.diffusion, joint.weights
    rows, size = arguments.batch, model.image_size
    x = jax.random.normal(jax.random.key(0), (rows, size, size, model.image_channels))
    t = np.full(rows, diffusion.steps // 2, np.int32)
    width = model.num_classes * (2 if model.multi_label else 1)
    targets = jax.nn.one_hot(np.arange(rows) % model.num_classes, width)
    if arguments.config:
        weights = jax.jit(model.init)(jax.random.key(1), x[:1], t[:1])

    def estimate(guidance, weights, x, t, targets):
        network = make_network(model, diffusion, weights)
        method, scale = Method(guidance=guidance), GUIDANCE[guidance].default_scale
        return guide(network, diffusion, method, targets, scale)(x, t).eps

    programs = {
        name: jax.jit(estimate, static_argnums=0).lower(name, weights, x, t, targets).compile()
        for name in GUIDANCE
    }
    times = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, program in programs.items():
            times[name].append(seconds(program, weights, x, t, targets))
    memory = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
    ratios = {
        name: [one / plain for one, plain in zip(mine, times["none"], strict=True)]
        for name, mine in times.items()
    }
    report = {
        name: {
            "time": round(statistics.median(ratios[name]), 2),
            "ratios": [round(ratio, 2) for ratio in ratios[name]],
            "memory": round(memory[name] / memory["none"], 2),
            "mebibytes": round(memory[name] / 2**20, 2),
        }
        for name in programs
    }
    for name, figures in report.items():
        print(
            f"{name:16} {spread(ratios[name])} × the time, {figures['memory']:.2f} × the memory "
            f"({figures['mebibytes']:,.1f} MiB)"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
