"""jdm train"""

import argparse
from pathlib import Path

from jdm import distributed, startup
from jdm.cli.shared import (
    add_config,
    add_other_data,
    add_processes,
    add_profile,
    processes_of,
    same_flags,
)
from jdm.config import flatten, load_config
from jdm.errors import InvalidValue
from jdm.files import location

HELP = "Train a joint model; the same command resumes."
EXAMPLE = "jdm train --config=digits --workdir=runs/digits --config.optim.lr=3e-4"


def add_flags(command: argparse.ArgumentParser) -> None:
    add_config(command, required=True)
    text = "the folder of checkpoints and metrics, also gs://bucket/folder"
    command.add_argument("--workdir", required=True, help=text)
    command.add_argument("--dry-run", action="store_true", help="build and compile, write nothing")
    add_other_data(command)
    add_profile(command, "a few training steps")
    add_processes(command)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    workdir = Path(location("workdir", arguments.workdir))
    if workdir.exists() and not workdir.is_dir():
        raise InvalidValue("workdir", arguments.workdir, "is a file; a folder is needed")
    processes = processes_of(arguments)
    values = {f"config.{key}": value for key, value in flatten(config).items()}
    startup.set_up()
    with distributed.joined(processes, same_flags(arguments) | values):
        from jdm import trainer

        names = ("dry_run", "other_data", "profile")
        options = {name: getattr(arguments, name) for name in names}
        trainer.train(config, workdir, **options)
