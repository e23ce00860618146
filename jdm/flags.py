"""What can be typed: the commands of jdm, their flags and help.

Owns names, defaults and the sentence for what does not parse. Runs nothing, and imports no JAX.
"""

import argparse
from collections.abc import Callable, Mapping

from jdm import config as configs
from jdm.pretrained import PRETRAINED

CHECKPOINT = f"a work folder, one of its checkpoints, or a packaged model: {', '.join(PRETRAINED)}"


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, without the usage text above them."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


class FlagError(Exception):
    """A flag that does not parse; the message is the whole sentence."""


def numbers(flag: str, text: str) -> list[int]:
    """[0, 1, 2, 3, 9] of "0-3,9". Raises FlagError."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise FlagError(
                f"--{flag}={text} is not a list of whole numbers and ranges, such as 0-63 or 1,5"
            )
        if dash and int(last) < int(first):
            raise FlagError(f"--{flag}={text} holds {part}, which runs downwards")
        if int(last or first) >= 2**32:  # before a list of them fills the memory
            raise FlagError(f"--{flag}={text} holds {last or first}; it must be below 2**32")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise FlagError(f"--{flag}={text} is empty")
    return found


def labels(text: str) -> list[dict[int, float]]:
    """What is asked of each image, {class: weight}: [{3: 1}, {}, {3: 0.7, 5: 0.3}, {3: 1, 5: 0}]
    of "3,none,3:0.7+5:0.3,3+!5"; ranges such as 0-9 are a class each. Raises FlagError.
    """
    found = []
    for part in text.split(","):
        if part == "none":
            found.append({})
        elif all(piece.isdecimal() for piece in part.split("-")):
            found += [{label: 1.0} for label in numbers("labels", part)]
        else:
            pieces = [_answer(text, piece) for piece in part.split("+")]
            found.append(dict(pieces))
            if len(found[-1]) < len(pieces):
                raise FlagError(f"--labels={text} names a class twice in {part}")
    return found


def _answer(text: str, piece: str) -> tuple[int, float]:
    """(class, weight) of "3", "!3" or "3:0.7"."""
    label, colon, weight = piece.removeprefix("!").partition(":")
    try:
        if not label.isdecimal() or (colon and piece.startswith("!")):
            raise ValueError
        return int(label), float(weight) if colon else float(not piece.startswith("!"))
    except ValueError:
        raise FlagError(
            f"--labels={text} is not a list such as 0-9, 3,none,5, 3:0.7+5:0.3 or 3+!5"
        ) from None


def parser(commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """Of all commands: {"train": what runs it, "data list": …}; parsed, `run` is that function."""
    whole = _Parser(prog="jdm", description="Joint diffusion models.", allow_abbrev=False)
    top = whole.add_subparsers(dest="command", required=True, metavar="command")

    def command(name, help_text, example, group=top):
        new = group.add_parser(
            name.split()[-1],
            help=help_text,
            description=help_text,
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        new.set_defaults(run=commands.get(name))
        return new

    new = command(
        "train",
        "Train a joint model; the same command resumes.",
        "jdm train --config=digits --workdir=runs/digits --config.optim.lr=3e-4",
    )
    new.add_argument(
        "--config", required=True, help=f"{', '.join(configs.names())}, or the path of a .py file"
    )
    new.add_argument("--workdir", required=True, help="where checkpoints and figures go")
    new.add_argument(
        "--config.SECTION.KEY",
        dest="unused",
        metavar="VALUE",
        help="override a value of the config",
    )
    new.add_argument("--dry-run", action="store_true", help="build and compile, write nothing")

    new = command(
        "sample",
        "Generate images.",
        "jdm sample --checkpoint=runs/digits --seeds=0-63 --labels=0,1,2 "
        "--guidance=representation --out=samples.png",
    )
    new.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    new.add_argument("--seeds", default="0-15", help="one image each: 0-63, or 1,5,9 (0-15)")
    new.add_argument(
        "--labels",
        help="cycled over the seeds: classes 0,1,2; none for an image without guidance; a mixture "
        "of classes 3:0.7+5:0.3; where the model knows several labels, on and off: 3+!5",
    )
    new.add_argument(
        "--guidance",
        default="none",
        help="none, pixel, representation, both or published (none)",
    )
    new.add_argument("--scale", type=float, help="of the guidance (its own default)")
    new.add_argument(
        "--scale_schedule",
        default="constant",
        help="of the scale on the way: constant, early, late or middle (constant)",
    )
    new.add_argument("--blocks", help="which representations move: mid,encoder_1_0 (all)")
    new.add_argument("--inner_steps", type=int, default=1, help="in how many steps they move (1)")
    new.add_argument(
        "--classifier", help=f"whose classifier pixel guidance follows: {CHECKPOINT} (its own)"
    )
    new.add_argument("--sampler", default="ddim", help="ancestral, ddim, dpmpp_2m or heun (ddim)")
    new.add_argument(
        "--steps", default="50", help="noise levels visited, or of each section: 10,10,20 (50)"
    )
    new.add_argument(
        "--spacing",
        default="uniform",
        help="what those levels are even in: uniform, quadratic or log_snr (uniform)",
    )
    new.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (0)")
    new.add_argument(
        "--threshold",
        default="static",
        help="how estimates of the clean image are held in the range of pixels: static, dynamic, "
        "or none, as in the published code (static)",
    )
    new.add_argument(
        "--batch_size",
        type=int,
        help="the most images per device and call (as many as are of use and fit in memory)",
    )
    new.add_argument(
        "--out",
        default="samples.png",
        help="a .png, a .gif of the way, an .npz, or a folder of images (samples.png)",
    )
    new.add_argument(
        "--resume", action="store_true", help="go on where a run to the same --out was interrupted"
    )
    _hosts(new)

    new = command(
        "eval",
        "Accuracy and cross-entropy.",
        "jdm eval --checkpoint=runs/digits --out=report/",
    )
    new.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    new.add_argument("--data", help="another data set of the same classes (that of the training)")
    new.add_argument("--split", default="test", help="train, validation or test (test)")
    new.add_argument("--data_dir", default="", help="where prepared data is, if not as in training")
    new.add_argument("--out", help="a folder for report.json")

    data = command("data", "Data sets: list, prepare or show.", "jdm data list")
    group = data.add_subparsers(dest="action", required=True, metavar="action")
    new = command("data list", "What is known.", "jdm data list", group)
    _data_dir(new)

    new = command(
        "data prepare",
        "Download a data set, or read a folder, once and for all.",
        "jdm data prepare cifar10; jdm data prepare folder:/path/of/images",
        group,
    )
    new.add_argument("name", help="of jdm data list, or folder:/path")
    new.add_argument(
        "--size", type=int, help="pixels to decode to at once (those of the list; of a folder none)"
    )
    new.add_argument(
        "--skip-broken", action="store_true", help="leave out images that cannot be read"
    )
    _data_dir(new)

    new = command(
        "data show",
        "A picture of a data set, with a column for each class.",
        "jdm data show cifar10 --out=grid.png",
        group,
    )
    new.add_argument("name", help="of jdm data list, or folder:/path")
    new.add_argument("--split", default="train", help="train, validation or test (train)")
    new.add_argument("--size", type=int, help="pixels of height and width (what the set has)")
    new.add_argument("--out", default="grid.png", help="a .png file (grid.png)")
    _data_dir(new)

    new = command(
        "convert",
        "Weights of the published PyTorch implementation to a work folder, and back.",
        "jdm convert --from=model.pt --config=reference/cifar10 --workdir=runs/ported; "
        "jdm convert --checkpoint=runs/ported --to=model.safetensors",
    )
    new.add_argument("--from", dest="source", help="a state_dict, .pt or .safetensors")
    new.add_argument("--config", help="of its network; --config.SECTION.KEY=VALUE overrides")
    new.add_argument("--workdir", help="the work folder to make")
    new.add_argument("--checkpoint", help=CHECKPOINT)
    new.add_argument("--to", help="the file to write, .pt or .safetensors")
    new.add_argument(
        "--without-head",
        action="store_true",
        help="the file has no classifier: a new head is initialised, or the head is left out",
    )
    return whole


def _hosts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--distributed",
        action="store_true",
        help="one of several hosts, each running this command; on TPU pods and under Slurm that is "
        "all, elsewhere the next three flags say which",
    )
    command.add_argument("--coordinator", help="host:port of the first host, such as 10.0.0.2:8476")
    command.add_argument("--hosts", type=int, help="how many there are")
    command.add_argument("--host", type=int, help="which of them this is, from 0")


def _data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data_dir", default="", help="of prepared data ($TFDS_DATA_DIR or ~/tensorflow_datasets)"
    )
