"""What a visitor can choose, from where it is declared: classes, samplers, guidance."""

from typing import Any

import numpy as np

from jdm import names
from jdm.diffusion.guidance import GUIDANCE, chosen
from jdm.diffusion.guidance import default_guidance as default_of
from jdm.diffusion.method import Method
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint

EVERY, NO_CLASS = -2, -1  # in place of a class
MOST_STEPS = 250  # of a request


def class_names(joint: Joint) -> list[str]:
    """The names of the classes or attributes; "class 0" and so on where they are unknown."""
    return list(joint.class_names) or [f"class {k}" for k in range(joint.model.num_classes)]


def classes(joint: Joint) -> list[tuple[str, int]]:
    """(what is shown, value) of each class that can be generated."""
    every = [("each class in turn", EVERY), ("no class in particular", NO_CLASS)]
    return [(name, k) for k, name in enumerate(class_names(joint))] + every


def guidances(joint: Joint) -> list[str]:
    """The names of the guidances that the model can have."""
    return [
        name
        for name in names.GUIDANCE
        if joint.has_classifier or "labels" not in GUIDANCE[name].takes
    ]


def default_guidance(joint: Joint, labelled: bool = True) -> str:
    return default_of(labelled and joint.has_classifier)


def most_steps(joint: Joint) -> int:
    return min(MOST_STEPS, joint.diffusion.steps)


def defaults(joint: Joint, guidance: str) -> tuple[str, int, float]:
    """(sampler, steps, scale) that go with a guidance where nothing is said."""
    method = chosen(Method(guidance=guidance), guidance != "none")
    return (
        method.sampler,
        min(int(method.steps), most_steps(joint)),
        GUIDANCE[guidance].default_scale,
    )


def labels(joint: Joint, choice: Any, without: Any, n: int) -> Any:
    """The labels of n images in the form that `jdm.sample` takes; None for no class.

    choice: a class, EVERY or NO_CLASS; of a multi-label model the attributes that are on, and
    without, those that are off.
    """
    if joint.model.multi_label:
        return attributes(joint, choice, without, n)
    if choice is None or choice == NO_CLASS:
        return None
    return [k % joint.model.num_classes for k in range(n)] if choice == EVERY else [int(choice)] * n


def attributes(joint: Joint, on: Any, off: Any, n: int = 1) -> np.ndarray | None:
    """Rows of 1, 0 and -1, int8 [n, K]; None where no attribute is chosen."""
    on, off = list(on or ()), list(off or ())
    if both := set(on) & set(off):
        name = class_names(joint)[min(both)]
        raise InvalidValue("The attribute", name, "cannot be both on and off")
    if not on and not off:
        return None
    row = np.full(joint.model.num_classes, -1, np.int8)
    row[on], row[off] = 1, 0
    return np.repeat(row[None], n, axis=0)


def target(joint: Joint, choice: Any, without: Any) -> Any:
    """The target of an explanation in the form that `jdm.explain` takes."""
    found = attributes(joint, choice, without) if joint.model.multi_label else choice
    if found is None:
        raise InvalidValue("The target", NO_VALUE, "is not chosen yet")
    return found if joint.model.multi_label else int(found)
