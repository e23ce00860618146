"""Where the time of a training step goes: the compiled operations, by what they compute.

    python benchmarks/operations.py [--recipe=cifar10] [--steps=3]

Protocol: the step that `jdm train` runs, without augmentation; --steps steps after two, traced by
the profiler. The time of an operation is that of its events in the trace, and what it computes is
told by the layer and the primitive that its name in the program ends in. Operations of a step may
run at the same time, so that the shares are of their sum.
"""

import argparse
import collections
import contextlib
import re
import sys
import tempfile
from pathlib import Path

from twins import RECIPES, config_of, images_of

# What an operation computes: the first of these that its name in the program matches.
KINDS = {
    "convolutions: products": r"(conv|shortcut|stem|out)\w*/.*(dot_general|conv_general_dilated)$",
    "convolutions: moving numbers": r"(conv|stem|up_\d|down_\d)\w*/",
    "attention": r"attention/",
    "normalisation": r"/norm",
    "dropout": r"Dropout",
    "SiLU": r"(residual|unet)\S*/(div|mul|logistic|exp|neg)$",
    "other layers": r"(jvp|transpose)\(JointModel|jvp\(",
    "optimiser, EMA, norm of the gradient": r"",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="cifar10", help=", ".join(RECIPES))
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    from jdm import startup

    startup.set_up()
    import jax

    from jdm.mesh import make_mesh, to_global
    from jdm.numerics import key_of
    from jdm.trainer import compile_step
    from jdm.training.build import build

    config, mesh, root = config_of(arguments.recipe), make_mesh(), key_of(0)
    run = build(config, mesh)
    with contextlib.redirect_stdout(sys.stderr):
        step = compile_step(config, run, mesh, root)
    named = r'^\s*(?:ROOT )?%?([\w.-]+) = .* metadata={op_name="([^"]*)"'
    names = dict(re.findall(named, step.as_text(), re.MULTILINE))
    state, batch = run.init(root), to_global(images_of(config, config.data.batch_size), mesh)
    for _ in range(2):
        state, _ = step(state, batch, root)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(arguments.steps):
                state, _ = jax.block_until_ready(step(state, batch, root))
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    times = collections.Counter()
    for event in (e for plane in planes for line in plane.lines for e in line.events):
        if event.name.startswith(("while", "call")):  # the operations inside have their own events
            continue
        # Copies that the compiler adds, such as a kernel in another layout, have no name.
        if event.name in names or re.match(r"\w*(fusion|copy|dot|while)[\w.-]*$", event.name):
            name = names.get(event.name, "")
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
            times[kind] += event.duration_ns
    total = sum(times.values())
    print("| operations | seconds a step | share |")
    print("|---|---|---|")
    for kind in KINDS:
        each = times[kind] / arguments.steps / 1e9
        print(f"| {kind} | {each:.3g} | {100 * times[kind] / total:.0f} % |")


if __name__ == "__main__":
    main()
