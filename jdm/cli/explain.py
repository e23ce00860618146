"""jdm explain"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdm import startup
from jdm.analysis.explain_options import FITTED, OPTIONS, ExplainOptions
from jdm.cli.shared import CHECKPOINT, load_joint
from jdm.diffusion.method import OPTIONS as METHOD
from jdm.diffusion.method import method_of
from jdm.errors import NO_VALUE, InvalidValue
from jdm.files import local_path
from jdm.messages import STDOUT, say

if TYPE_CHECKING:
    import numpy as np

    from jdm.joint import Joint

HELP = "Show what would have to change in images for another class."
EXAMPLE = "jdm explain --checkpoint=runs/digits --images=five.png --target=3 --out=why.png"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    add("--images", help="a PNG or JPEG file, or a folder of them; of any size")
    add("--split", help="in place of --images: test, validation or train of the model's own data")
    add("--limit", type=int, default=16, help="the most images of the --split (16)")
    text = "the class, by its number or name; of a multi-label model attributes: smile+!hat"
    add("--target", required=True, help=text)
    add("--seeds", default="0", help="one for each counterfactual of an image: 0-3, or 1,5 (0)")
    add("--region", help="an image of the model's size: pixels above mid-grey may change (all)")
    text = f"an independent classifier, which is asked too: {FITTED}, that of jdm eval, or a model"
    add("--reference", help=f"{text}: {CHECKPOINT}")
    for name, option in {**OPTIONS, **METHOD}.items():
        add(f"--{name}", help=option.flag_help)
    add("--batch_size", type=int, help="the most images per device and call")
    add("--out", default="why.png", help="a .png, an .npz, or a new folder (why.png)")


def run(arguments: argparse.Namespace) -> None:
    from jdm.sampling.labels import parse_numbers

    seeds = parse_numbers("seeds", arguments.seeds)
    given = {
        name: option.read(name, text)
        for name, option in {**OPTIONS, **METHOD}.items()
        if (text := getattr(arguments, name)) is not None
    }
    ExplainOptions(**{name: value for name, value in given.items() if name in OPTIONS})
    method_of(None, {name: value for name, value in given.items() if name in METHOD})
    if (arguments.images is None) == (arguments.split is None):
        raise InvalidValue("images", arguments.images or NO_VALUE, "or --split is needed, not both")
    if arguments.limit < 1:
        raise InvalidValue("limit", arguments.limit, "must be positive")
    files = image_files(arguments.images) if arguments.images else []
    startup.set_up()
    from jdm.analysis.explain import explain
    from jdm.analysis.explain.explanations import check_out

    out = check_out(arguments.out)
    joint = load_joint("checkpoint", arguments.checkpoint)
    reference = arguments.reference
    if reference and reference != FITTED:
        reference = load_joint("reference", reference)
    images = _decoded(joint, files) if files else _of_split(joint, arguments)
    try:
        found = explain(
            joint,
            images,
            _target(joint, arguments.target),
            seeds=seeds,
            region=None if arguments.region is None else _region(joint, arguments.region),
            reference=reference or None,
            batch_size=arguments.batch_size,
            **given,
        )
    except InvalidValue as error:
        raise (error.about("checkpoint") if error.parameter == "joint" else error) from None
    found.save(out)
    for name, value in found.summary().items():
        print(f"{name:16} {value:.4g}")
    for reason in sorted(set(found.reasons) - {""}):
        print(f"{found.reasons.count(reason)} of {len(found)}: {reason}")
    say(f"wrote {out}", STDOUT)


def image_files(path: str) -> list[Path]:
    """The PNG and JPEG files of a folder, in alphabetical order, or the one file."""
    from jdm.data.folder import ENDINGS

    given = Path(local_path("images", path))
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise InvalidValue("images", path, "is neither a file nor a folder")
    found = sorted(p for p in given.iterdir() if p.name.lower().endswith(ENDINGS))
    if not found:
        raise InvalidValue("images", path, "is a folder without a PNG or JPEG file")
    return found


def _decoded(joint: "Joint", files: list[Path], flag: str = "images") -> "np.ndarray":
    """The images at the model's size, cut and resized as its training images were."""
    import numpy as np

    from jdm.data.decoding import check_image, decode

    size, _, channels = joint.image_shape
    found = []
    for file in files:
        content = file.read_bytes()
        if why := check_image(content):
            raise InvalidValue(flag, str(file), f"cannot be decoded: {why}")
        found.append(decode(content, size, channels))
    return np.stack(found)


def _of_split(joint: "Joint", arguments: argparse.Namespace) -> "np.ndarray":
    from jdm.data.splits import ReadOptions, load_split

    options = ReadOptions.of(joint.config.data, joint.config.model)
    return load_split(joint.config.data.name, arguments.split, options).images[: arguments.limit]


def _region(joint: "Joint", path: str) -> "np.ndarray":
    """The pixels of an image of the model's size that are above mid-grey."""
    import numpy as np
    from PIL import Image

    from jdm.data.decoding import check_image

    file, size = Path(local_path("region", path)), joint.image_shape[:2]
    if not file.is_file():
        raise InvalidValue("region", path, "is not a file")
    if why := check_image(file.read_bytes()):
        raise InvalidValue("region", path, f"cannot be decoded: {why}")
    pixels = np.asarray(Image.open(file).convert("L"))
    if pixels.shape != size:
        allowed = f"is of {pixels.shape[1]}×{pixels.shape[0]} pixels; the model's images are "
        raise InvalidValue("region", path, f"{allowed}{size[1]}×{size[0]}")
    return pixels > 127


def _target(joint: "Joint", text: str) -> Any:
    """The target in the form that `jdm.explain` takes."""
    if not joint.model.multi_label:
        return text
    from jdm.sampling.labels import cycled, parse_labels

    model = joint.model
    try:
        return cycled(parse_labels(text), 1, model.num_classes, True, joint.class_names)
    except InvalidValue as error:
        raise error.about("target") from None
