"""Method: every option of sampling, declared once.

The flags of `jdm sample`, the signature and docstring of `jdm.sample`, the settings that are saved
with images, and the table in docs/sampling.md are all generated from the fields of `Method`. Which
options a sampler or a guidance uses is in its record (jdm.diffusion.samplers, .guidance). This
module does not import JAX, so that flags can be checked before JAX is imported.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jdm import names
from jdm.errors import InvalidValue
from jdm.options import (
    COUNT,
    FLOAT32,
    NUMBER,
    TEXT,
    TUPLE,
    UNIT,
    Option,
    Rule,
    check_fields,
    declared,
    options_of,
    plain_number,
)


@typing.no_type_check  # of the tests' run-time checker, so that Option.check reports wrong types
@dataclasses.dataclass(frozen=True)
class Method:
    """How images are sampled. Raises InvalidValue for a wrong type, name or range of an option.

    The default None of an option is replaced by `guidance.chosen` before anything is sampled.
    """

    sampler: str = declared(
        None,
        "the algorithm of each denoising step",
        names=names.SAMPLERS,
        kind=TEXT,
        unset="ancestral with guidance, otherwise ddim",
    )
    steps: int | str = declared(
        None,
        "number of timesteps, or of those in each section, such as 10,10,20",
        kind=COUNT,
        unset="20 with guidance, otherwise 50",
    )
    spacing: str = declared("uniform", "how the visited timesteps are spaced", names=names.SPACINGS)
    eta: float = declared(0.0, "noise of ddim: 0 is deterministic, 1 as noisy as ancestral", UNIT)
    s_noise: float = declared(
        1.0,
        "factor of the noise that ancestral adds: above 1, images differ more and are further from "
        "the data",
        Rule("between 0 and 2", lambda v: 0 <= v <= 2),
    )
    threshold: str = declared(
        None,
        "how estimates of the clean image are brought into [-1, 1]: clipped (static), scaled down "
        "(dynamic), or not at all (none)",
        names=names.THRESHOLDS,
        kind=TEXT,
        unset="static; none with published guidance",
    )
    guidance: str = declared(
        None,
        "what steers samples toward their labels",
        names=names.GUIDANCE,
        kind=TEXT,
        unset="representation with labels (pixel with another classifier), none without",
    )
    scale: float | None = declared(
        None,
        "strength of the guidance; positive is toward the label, negative away from it",
        FLOAT32,
        kind=NUMBER,
        unset="that of the guidance",
    )
    scale_schedule: str = declared(
        "constant", "how the scale changes from noise to image", names=names.SCALE_SCHEDULES
    )
    blocks: tuple[str, ...] | None = declared(
        None, "blocks whose features are moved, such as mid,encoder_1_0", kind=TUPLE, unset="all"
    )

    def __post_init__(self):
        check_fields(self)

    def settings(self) -> dict[str, Any]:
        """The options and their values, ready for JSON."""
        values = dataclasses.asdict(self)
        return values | {"blocks": None if self.blocks is None else list(self.blocks)}

    def changed(self) -> set[str]:
        """The names of the options that differ from their defaults."""
        return {name for name, option in OPTIONS.items() if getattr(self, name) != option.default}


OPTIONS: dict[str, Option] = options_of(Method)


def check_takes(method: Method, chooser: str, records: Mapping[str, Any]) -> None:
    """Raises InvalidValue for an option that the chosen sampler or guidance does not use, but
    another does. chooser: "sampler" or "guidance". records: SAMPLERS or GUIDANCE."""
    chosen = getattr(method, chooser)
    for name in sorted(method.changed() - set(records[chosen].takes)):
        takers = [other for other, record in records.items() if name in record.takes]
        if takers:
            allowed = f"goes with {chooser} {' or '.join(takers)}, not {chosen!r}"
            raise InvalidValue(name, getattr(method, name), allowed)


def method_of(method: Method | None, options: dict[str, Any]) -> Method:
    """`method` with these options replaced; numbers may be NumPy's, and `blocks` a list. Raises
    TypeError for a name that is not an option, InvalidValue for a wrong value."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"unexpected keyword argument {name!r}")
    plain = {name: plain_number(value) for name, value in options.items()}
    if isinstance(plain.get("blocks"), list):
        plain["blocks"] = tuple(plain["blocks"])
    return dataclasses.replace(method or Method(), **plain)
