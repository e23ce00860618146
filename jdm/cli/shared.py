"""What several commands share: flags, loading a model, and checks of flags."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdm import distributed
from jdm.config import config_names
from jdm.errors import InvalidValue
from jdm.files import local_path
from jdm.hub import model_path
from jdm.pretrained import PRETRAINED

if TYPE_CHECKING:
    from jdm.joint import Joint

CHECKPOINT = (
    "a work folder (also gs://bucket/folder), one of its checkpoints, hf://owner/name[@revision], "
    "or a packaged model: "
    f"{', '.join(PRETRAINED)}"
)


def add_data_dir(command: argparse.ArgumentParser) -> None:
    """The flag --data_dir."""
    text = "the folder of prepared data ($TFDS_DATA_DIR or ~/tensorflow_datasets)"
    command.add_argument("--data_dir", default="", help=text)


def data_dir(arguments: argparse.Namespace) -> str:
    """The path of --data_dir; "" is its default. Raises InvalidValue where it is not local."""
    return arguments.data_dir and local_path("data_dir", arguments.data_dir)


def add_config(command: argparse.ArgumentParser, required: bool) -> None:
    """The flags --config and --config.SECTION.KEY."""
    add, text = command.add_argument, f"{', '.join(config_names())}, or the path of a .py file"
    add("--config", required=required, help=text)
    text = "override a value of the config"
    add("--config.SECTION.KEY", dest="unused", metavar="VALUE", help=text)


def add_other_data(command: argparse.ArgumentParser) -> None:
    """The flag --other-data."""
    text = "accept data with other images or classes than the model was trained on"
    command.add_argument("--other-data", action="store_true", help=text)


def add_profile(command: argparse.ArgumentParser, what: str) -> None:
    """The flag --profile. what: of which a trace is written."""
    text = f"a new or empty folder for a trace of {what}, which xprof opens"
    command.add_argument("--profile", help=text)


def add_processes(command: argparse.ArgumentParser) -> None:
    """The flags of runs of several processes."""
    for name, option in distributed.OPTIONS.items():
        if option.default is False:
            command.add_argument(f"--{name}", action="store_true", help=option.help)
        else:
            command.add_argument(f"--{name}", help=option.flag_help)


def processes_of(arguments: argparse.Namespace) -> distributed.Processes:
    """What these flags say. Raises InvalidValue, see distributed.Processes."""
    values = {name: getattr(arguments, name) for name in distributed.OPTIONS}
    read = {
        name: distributed.OPTIONS[name].read(name, value) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None
    }
    return distributed.Processes(**read)


def same_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that must be the same in all processes of a run, and their values: all but the
    number of the process and the address, which may have several names. Those of the config are in
    its values."""
    own = ("coordinator", "process", "config", "config.SECTION.KEY", "help", "h")
    values = {flag: getattr(arguments, flag.replace("-", "_"), None) for flag in arguments.flags}
    return {flag: value for flag, value in sorted(values.items()) if flag not in own}


def load_joint(flag: str, path: str) -> "Joint":
    """The model at the path that a flag names. Raises InvalidValue where it cannot be loaded."""
    from jdm.checkpoint import CheckpointError
    from jdm.joint import load

    found = model_path(flag, path)
    try:
        return load(found)
    except InvalidValue as error:
        if error.parameter == "path":  # a repository that is not there
            raise error.about(flag) from None
        raise InvalidValue(flag, path, f"cannot be loaded: {error}") from error
    except CheckpointError as error:
        raise InvalidValue(flag, path, f"cannot be loaded: {error}") from error


def check_parent(flag: str, out: str) -> Path:
    """The path of a file to write. Raises InvalidValue where its folder does not exist."""
    path = Path(local_path(flag, out))
    if not path.parent.is_dir():
        raise InvalidValue(flag, out, f"cannot be written: the folder {path.parent} does not exist")
    return path


def check_size(size: int | None) -> None:
    """Raises InvalidValue for a --size that is not positive."""
    if size is not None and size < 1:
        raise InvalidValue("size", size, "must be positive")
