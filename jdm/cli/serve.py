"""jdm serve"""

import argparse
import importlib.util

from jdm import startup
from jdm.cli.shared import CHECKPOINT, load_joint
from jdm.errors import Failure
from jdm.serve.options import OPTIONS, ServeOptions

HELP = "Open a local web page of a model: generate, classify, explain."
EXAMPLE = "jdm serve --checkpoint=runs/digits"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    text = "the folder that jdm eval wrote, whose figures are shown (report/ in the work folder)"
    add("--report", help=text)
    for name, option in OPTIONS.items():
        add(f"--{name}", help=option.flag_help)


def run(arguments: argparse.Namespace) -> None:
    texts = {name: getattr(arguments, name) for name in OPTIONS}
    given = {k: OPTIONS[k].read(k, text) for k, text in texts.items() if text is not None}
    options = ServeOptions(**given)
    if importlib.util.find_spec("gradio") is None:
        raise Failure("the page needs gradio: pip install 'jdm[serve]'")
    startup.set_up()
    from jdm.serve.server import check_port, serve

    check_port(options)  # before the model is loaded, which takes longer
    serve(
        load_joint("checkpoint", arguments.checkpoint),
        arguments.checkpoint,
        arguments.report,
        options,
    )
