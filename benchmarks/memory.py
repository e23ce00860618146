"""A training step by how the C library keeps memory: time and page faults.

    python benchmarks/memory.py [--configs=digits,mnist,reference/cifar10] [--rounds=9]

On a CPU, XLA allocates the memory of a program in every call. Protocol: four processes take turns,
one round each, after one round that is not counted. A round is --steps training steps of a batch of
random images (cifar10: 16 of them).

as it is    glibc's own settings: memory is returned to the system, which clears it the next time
kept        nothing is returned, and threads have heaps of their own, as glibc gives them
gaps        one heap for all threads, with the gaps that compiling leaves
one heap    as commands of jdm set it (jdm/startup.py): the same, and the gaps are closed

Each process compiles its program: one that is read from the cache leaves no gaps. The ratio is the
median, over the rounds, of a row's time over that of the last row in the same round (least to
greatest). Faults are those of one step in the last round.
"""

import argparse
import contextlib
import os
import resource
import statistics
import sys

from contenders import KEPT, Contender, serve, timed
from twins import images_of

from jdm.config import load_config
from jdm.errors import InvalidValue

# A variable MALLOC_... leaves memory as it says; this one has glibc's own value.
AS_IT_IS = {"MALLOC_TOP_PAD_": str(2**17)}
GAPS = {"GAPS_STAY": "1"}  # read below
CONTENDERS = {"as it is": AS_IT_IS, "kept": KEPT, "gaps": GAPS, "one heap": {}}


def serve_steps(name: str, steps: int) -> None:
    from jdm import startup

    startup.set_up()
    import jax

    from jdm.mesh import make_mesh, to_global
    from jdm.numerics import key_of
    from jdm.trainer import compile_step
    from jdm.training.build import build

    if os.environ.keys() & GAPS:
        startup._close_gaps = lambda: None
    config, mesh, root = load_config(name), make_mesh(), key_of(0)
    config.data.batch_size = min(config.data.batch_size, 32 if config.model.channels < 64 else 16)
    config.loss.augment = "none"
    run = build(config, mesh)
    state = run.init(root)
    batch = to_global(images_of(config, config.data.batch_size), mesh)
    with contextlib.redirect_stdout(sys.stderr):
        step = compile_step(config, run, mesh, root)
    faults = 0.0

    def round_once():
        nonlocal state, faults
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(steps):
            state, metrics = step(state, batch, root)
        jax.block_until_ready((state, metrics))
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

    serve({"round": timed(round_once), "faults": lambda: faults})


def measure(name: str, rounds: int, steps: int) -> None:
    """Prints the rows of one config."""
    from timing import spread

    arguments = (__file__, f"--configs={name}", f"--steps={steps}", "--serve")
    running = {
        row: Contender(*arguments, environment=environment | {"JAX_ENABLE_COMPILATION_CACHE": "0"})
        for row, environment in CONTENDERS.items()
    }
    for one in running.values():
        one.ask("round")
    times: dict[str, list[float]] = {row: [] for row in running}
    for _ in range(rounds):
        for row, one in running.items():
            times[row].append(one.ask("round") / steps)
    for row, one in running.items():
        ratios = [a / b for a, b in zip(times[row], times["one heap"], strict=True)]
        peak = one.ask("memory") / 2**30
        cells = [name, row, f"{statistics.median(times[row]):.3g}", spread(ratios)]
        cells += [f"{one.ask('faults'):,.0f}", f"{peak:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        one.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default="digits,mnist,reference/cifar10", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="%(default)s")
    parser.add_argument("--steps", type=int, default=3, help="in a round (%(default)s)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.configs.split(",")
    if arguments.serve:
        return serve_steps(names[0], arguments.steps)
    if kept := [name for name in os.environ if name.startswith("MALLOC_")]:
        parser.error(f"{kept[0]} is set, and would decide how every row keeps memory")
    try:
        for name in names:
            load_config(name)
    except InvalidValue as error:
        parser.error(str(error))
    print("| config | memory | seconds a step | its time : one heap's | faults | GiB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        measure(name, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    sys.exit(main())
