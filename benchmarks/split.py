"""Sampling with weights that are split over the devices (exec.mesh=fsdp): when they are gathered.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/split.py

Protocol. Guided samples of a checkpoint, one batch (--batch, default 64) by the defaults, on all
devices, with the weights

    whole       on every device, as with exec.mesh=data
    call        split, and gathered before the program runs: what jdm does (jdm.mesh.whole)
    program     split, and gathered by the program itself
    partition   split, and left to XLA, which decides what it moves: weights or activations

They take turns for --rounds rounds. A ratio is the median, over the rounds, of the time in a round
over that of "whole" in the same round, with the least and the largest. Memory is the compiled
program's own account, on each device: of its arguments and of all else. All images must be equal.
"""

import argparse
import functools

import numpy as np

from jdm import startup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="digits", help="a work folder, or digits")
    parser.add_argument("--batch", type=int, default=64, help="a multiple of the devices")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} must be 1 or more")

    startup.set_up()
    import jax
    from timing import seconds, spread

    from jdm.checkpoint import CheckpointError
    from jdm.diffusion.method import Method
    from jdm.errors import InvalidValue
    from jdm.joint import abstract_weights, load
    from jdm.mesh import check_batch, on_devices, replicated, whole
    from jdm.sampling import programs
    from jdm.sampling.request import check_request

    rows, seeds = arguments.batch, np.arange(arguments.batch)
    try:
        joint, split = (load(arguments.checkpoint, mesh=name) for name in ("data", "fsdp"))
        mesh = joint.mesh
        check_batch(rows, mesh, "--batch")
        labels = seeds % joint.model.num_classes
        request = check_request(joint, labels=labels, seeds=seeds, method=Method())
    except (CheckpointError, InvalidValue) as error:
        parser.error(str(error))
    inputs = on_devices((request.seeds, request.targets), rows, mesh)
    scale = jax.device_put(np.float32(request.scale), replicated(mesh))
    static = (joint.model, None, joint.diffusion, request.recipe)
    sample = functools.partial(programs._sample.__wrapped__, *static)

    def gathering(weights, *rest):
        weights = jax.lax.with_sharding_constraint(weights[0], replicated(mesh))
        return sample((weights, None), *rest)

    def compiled(function, weights):
        return jax.jit(function).lower((weights, None), *inputs, scale, None).compile()

    shapes = abstract_weights(joint.model, mesh, "fsdp")
    at_once, partitioned = compiled(sample, joint.weights), compiled(sample, shapes)
    gathers = compiled(gathering, shapes)
    contenders = {
        "whole": (at_once, lambda: joint.weights),
        "call": (at_once, lambda: whole(split.weights)),
        "program": (gathers, lambda: split.weights),
        "partition": (partitioned, lambda: split.weights),
    }

    def images(name):
        program, weights = contenders[name]
        return program((weights(), None), *inputs, scale, None)[0]

    expected, times = np.asarray(images("whole")), {name: [] for name in contenders}
    for name in contenders:
        difference = np.abs(np.asarray(images(name)).astype(int) - expected).max()
        assert difference == 0, (name, difference)
    for _ in range(arguments.rounds):
        for name in contenders:
            times[name].append(seconds(images, name))

    print(f"{rows} images on {mesh.size} × {mesh.devices.flat[0].device_kind}")
    print(f"{'weights':12}{'time':>22}{'arguments':>14}{'all else':>12}")
    for name, (program, _) in contenders.items():
        ratios = [a / b for a, b in zip(times[name], times["whole"], strict=True)]
        memory = program.memory_analysis()
        both = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
        sizes = [f"{size / 2**20:.1f} MiB" for size in both]
        print(f"{name:12}{spread(ratios):>22}{sizes[0]:>14}{sizes[1]:>12}")


if __name__ == "__main__":
    main()
