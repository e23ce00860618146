"""What can be typed: the commands of jdm, their flags and help.

Owns names, defaults and the sentence for what does not parse. Runs nothing, and imports no JAX.
"""

import argparse
from collections.abc import Callable, Mapping

from jdm import config as configs


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, without the usage text above them."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


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
    new.add_argument("--checkpoint", required=True, help="a work folder, or one of its checkpoints")
    new.add_argument("--seeds", default="0-15", help="one image each: 0-63, or 1,5,9 (0-15)")
    new.add_argument("--labels", help="classes, cycled over the seeds: 0,1,2")
    new.add_argument(
        "--guidance", default="none", help="none, pixel, representation or published (none)"
    )
    new.add_argument("--scale", type=float, help="of the guidance (its own default)")
    new.add_argument("--classifier", help="a work folder whose classifier pixel guidance follows")
    new.add_argument("--sampler", default="ddim", help="ddim or ancestral (ddim)")
    new.add_argument(
        "--steps", default="50", help="noise levels visited, or of each section: 10,10,20 (50)"
    )
    new.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (0)")
    new.add_argument(
        "--no-clip",
        dest="clip",
        action="store_false",
        help="estimates of the clean image may leave the range of pixels, as in the published code",
    )
    new.add_argument("--batch_size", type=int, default=64, help="images per device and call (64)")
    new.add_argument("--out", default="samples.png", help="a .png or .npz file (samples.png)")

    new = command(
        "eval",
        "Accuracy and cross-entropy.",
        "jdm eval --checkpoint=runs/digits --out=report/",
    )
    new.add_argument("--checkpoint", required=True, help="a work folder, or one of its checkpoints")
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
    new.add_argument("--checkpoint", help="a work folder, or one of its checkpoints")
    new.add_argument("--to", help="the file to write, .pt or .safetensors")
    new.add_argument(
        "--without-head",
        action="store_true",
        help="the file has no classifier: a new head is initialised, or the head is left out",
    )
    return whole


def _data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data_dir", default="", help="of prepared data ($TFDS_DATA_DIR or ~/tensorflow_datasets)"
    )
