"""The command `jdm`: its parser, and how errors are printed.

Each command is a file of this folder, listed in COMMANDS, with its HELP, an EXAMPLE, `add_flags`
and `run`. An error is printed as one sentence without a traceback. The exit status is 2 for a wrong
flag or config key, 143 for a training that SIGTERM has ended (jdm.distributed.PREEMPTED), and 1 for
any other failure. A closed output ends a command quietly (`jdm data list | head -1`), and no
training or sampling. Commands import JAX inside their functions, so that flags and configs are
checked first.
"""

import argparse
import importlib
import sys
import warnings
from typing import NoReturn

import jdm
from jdm.errors import NO_VALUE, Failure, InvalidValue, first_ten
from jdm.messages import STDOUT, alert, discard, nobody_reads, open_missing, say

COMMANDS = (
    *("train", "sample", "eval", "compare", "probe", "explain"),
    *("data list", "data prepare", "data show", "convert", "plan", "push", "serve", "doctor"),
)
GROUPS = {"data": "Data sets: list, prepare or show."}


class _Parser(argparse.ArgumentParser):
    """Prints an error as one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> None:
    """Runs one command line; exits with its status where that is not 0."""
    open_missing()
    try:
        _main(sys.argv[1:] if argv is None else argv)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python would print a traceback at exit
                discard(stream)


def _main(argv: list[str]) -> None:
    overrides = [flag for flag in argv if flag.startswith("--config.")]
    arguments = parser().parse_args([flag for flag in argv if flag not in overrides])
    arguments.overrides = overrides
    warnings.showwarning = lambda message, *_: alert(f"warning: {message}")
    try:
        if overrides and not getattr(arguments, "config", None):
            said = "goes with --config; a checkpoint has its config"
            raise InvalidValue(overrides[0], NO_VALUE, said)
        arguments.run(arguments)
        sys.stdout.flush()  # a result that cannot be written is an error
    except InvalidValue as error:
        for line in first_ten(error.details):
            say(line, STDOUT)
        name = error.parameter
        _exit(arguments, error.sentence(f"--{name}" if name in arguments.flags else name), 2)
    except (Failure, FloatingPointError, MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError) and nobody_reads(sys.stdout):
            sys.exit(141)  # as if by SIGPIPE: who reads the result, such as head, has enough
        _exit(arguments, str(error), error.status if isinstance(error, Failure) else 1)
    except KeyboardInterrupt:
        _exit(arguments, "interrupted", 130)


def _exit(arguments: argparse.Namespace, sentence: str, status: int) -> NoReturn:
    alert(f"jdm {arguments.full_name}: {sentence}")
    sys.exit(status)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. It sets `run`, the function of the chosen command, `full_name`,
    its name, and `flags`, the names of its flags without dashes."""
    whole = _Parser(prog="jdm", description="Joint diffusion models.", allow_abbrev=False)
    whole.add_argument("--version", action="version", version=f"jdm {jdm.__version__}")
    groups = {"": whole.add_subparsers(dest="command", required=True, metavar="command")}
    for name in COMMANDS:
        module = importlib.import_module(f"jdm.cli.{name.replace(' ', '_')}")
        example, (group, _, last) = f"example: {module.EXAMPLE}", name.rpartition(" ")
        if group not in groups:
            text = GROUPS[group]
            parent = groups[""].add_parser(group, help=text, description=text, epilog=example)
            groups[group] = parent.add_subparsers(dest="action", required=True, metavar="action")
        command = groups[group].add_parser(
            last, help=module.HELP, description=module.HELP, epilog=example, allow_abbrev=False
        )
        module.add_flags(command)
        for action in command._actions:
            if action.type is None and action.default != "":  # where "" is not the default itself
                action.type = _not_empty
        flags = {flag.lstrip("-") for action in command._actions for flag in action.option_strings}
        command.set_defaults(run=module.run, full_name=name, flags=flags)
    return whole


def _not_empty(text: str) -> str:
    """The text of a flag; an unset variable of a shell script (--workdir=$RUN) is an error."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text
