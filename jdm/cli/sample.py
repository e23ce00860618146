"""jdm sample"""

import argparse

from jdm import distributed, startup
from jdm.cli.shared import (
    CHECKPOINT,
    add_processes,
    add_profile,
    check_parent,
    load_joint,
    processes_of,
    same_flags,
)
from jdm.diffusion.method import OPTIONS, method_of
from jdm.errors import InvalidValue
from jdm.files import new_folder
from jdm.messages import STDOUT, say

HELP = "Generate images."
EXAMPLE = "jdm sample --checkpoint=runs/digits --seeds=0-63 --labels=0,1,2 --out=samples.png"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    add("--seeds", default="0-15", help="the seeds, one for each image: 0-63, or 1,5,9 (0-15)")
    text = (
        "repeated until there is one for each seed: classes 0,1,2 or their names cat,dog; none for "
        "an image without guidance; mixtures of classes 3:0.7+5:0.3; attributes on and off of a "
        "multi-label model 3+!5"
    )
    add("--labels", help=text)
    for name, option in OPTIONS.items():
        add(f"--{name}", help=option.flag_help)
    add("--classifier", help=f"the guidance classifier: {CHECKPOINT} (the model's own)")
    text = "the most images per device and call (as many as are useful and fit in memory)"
    add("--batch_size", type=int, help=text)
    text = "a .png, a .gif of the trajectory, an .npz, or a folder of images (samples.png)"
    add("--out", default="samples.png", help=text)
    add("--resume", action="store_true", help="continue an interrupted run to the same --out")
    add_profile(command, "the sampling of one batch, which is generated once more for that")
    add_processes(command)


def run(arguments: argparse.Namespace) -> None:
    # Imported here, because it imports NumPy, which takes a third of the time of `jdm --help`.
    from jdm.sampling.labels import cycled, parse_labels, parse_numbers

    seeds = parse_numbers("seeds", arguments.seeds)
    weights = None if arguments.labels is None else parse_labels(arguments.labels)
    texts = {name: getattr(arguments, name) for name in OPTIONS}
    given = {k: OPTIONS[k].read(k, text) for k, text in texts.items() if text is not None}
    method = method_of(None, given)
    out = check_parent("out", arguments.out)
    processes = processes_of(arguments)
    traces = arguments.profile and new_folder("profile", arguments.profile, make=True)

    startup.set_up()
    with distributed.joined(processes, same_flags(arguments)):
        from jdm import terminal
        from jdm.sampling import generate, runs
        from jdm.sampling.request import check_request
        from jdm.sampling.samples import check_format

        trajectory = check_format(out) == ".gif"
        joint = load_joint("checkpoint", arguments.checkpoint)
        classifier = arguments.classifier and load_joint("classifier", arguments.classifier)
        model, n, batch_size = joint.model, len(seeds), arguments.batch_size
        classes = (model.num_classes, model.multi_label, joint.class_names)
        labels = weights and cycled(weights, n, *classes)
        try:
            request = check_request(
                joint,
                labels=labels,
                seeds=seeds,
                method=method,
                classifier=classifier or None,
                trajectory=trajectory,
                batch_size=batch_size,
            )
        except InvalidValue as error:
            raise (error.about("checkpoint") if error.parameter == "joint" else error) from None
        paths = {name: getattr(arguments, name) for name in ("checkpoint", "classifier")}
        settings = request.settings(joint, **paths)
        if traces:
            generate.profile(joint, request, batch_size, traces)
        done = runs.run(
            joint, request, settings, out, resume=arguments.resume, batch_size=batch_size
        )
        if done and out.suffix == ".png" and distributed.is_main():
            terminal.show(out)
        say(f"wrote {n} images to {out}" if done else f"{out} is complete already", STDOUT)
