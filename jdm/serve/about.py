"""What is known of a checkpoint: its config, its data, and what was measured of it."""

import dataclasses
import functools
import html
import json
import warnings
from pathlib import Path
from typing import Any

from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.analysis.report import REPORT, Report, number, read
from jdm.data.fit import evaluation_options
from jdm.data.splits import load_split
from jdm.errors import Failure, InvalidValue
from jdm.hub import model_path
from jdm.joint import Joint
from jdm.pretrained import PRETRAINED
from jdm.serve import choices, show
from jdm.serve.options import ServeOptions

MOST = 500  # images that are looked at when the page starts, where there is no report
SPLIT = "test"
UNKNOWN = (
    "How often these probabilities are right was not measured: there is no report of jdm eval, and "
    "the data of the model is not prepared here."
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """figures: {metric: value}. of: on which images, in words; "" where nothing was measured."""

    figures: dict[str, float]
    of: str

    @property
    def calibration(self) -> str:
        """What is to be thought of the model's probabilities, for a visitor."""
        error = self.figures.get("calibration_error")
        if error is None:
            return UNKNOWN
        right = self.figures.get("accuracy")
        said = "" if right is None else f"the model is right on {right:.1%}. Its "
        text = f"On {self.of}, {said}expected calibration error is {error:.1%}: confidence and "
        text += "share of right answers differ by so much, on average. "
        if temperature := self.figures.get("temperature"):
            kind = "over" if temperature > 1 else "under"
            text += (
                f"The temperature that fits best is {temperature:.2f} ({kind}confident without; "
            )
            text += "it is not applied here). "
        return text + "They say nothing of pictures unlike the training images."


def facts_of(joint: Joint, path: str, report: str | None) -> Facts:
    """What was measured: the report that is given, or one in the folder "report" of the work
    folder, or what the test images say now, up to 500 of them.

    Raises InvalidValue, about "report", where the given one cannot be read or is of other weights.
    """
    if report is not None:
        found = read("report", report)
        if (weights := found.protocol.get("weights")) != joint.digest:
            raise InvalidValue("report", report, f"is of other weights ({weights})")
        return _of_report(found)
    if path not in PRETRAINED:
        # A path that does not exist, where the model is on the hub or in a bucket.
        beside = Path(model_path("checkpoint", path)) / "report" / REPORT
        if beside.is_file():
            found = read("report", beside)
            if found.protocol.get("weights") == joint.digest:
                return _of_report(found)
    return _measured(joint)


def _of_report(report: Report) -> Facts:
    figures = {
        name: value
        for found in report.results.values()
        for name, value in found.items()
        if isinstance(value, float)
    }
    p = report.protocol
    return Facts(figures, f"{p['images']:,} {p['split']} images of {p['data']}")


def _measured(joint: Joint) -> Facts:
    nothing = Facts({}, "")
    if not joint.has_classifier:
        return nothing
    config = joint.config
    try:
        options = evaluation_options(config.data.name, config.data, config.model)
        load = functools.partial(load_split, config.data.name, options=options)
        split = load(SPLIT)
        split = dataclasses.replace(split, images=split.images[:MOST], labels=split.labels[:MOST])
        settings = EvaluationOptions(config.eval.batch_size, load=load)
        figures: dict[str, Any] = dict(evaluate(joint, ["classification"], split, settings))
        try:
            figures |= dict(evaluate(joint, ["calibration"], split, settings))
        except InvalidValue:  # there is no validation split to fit a temperature on
            pass
    except (Failure, InvalidValue, OSError) as error:
        warnings.warn(f"nothing is measured of the model: {error}", stacklevel=2)
        return nothing
    kept = {name: value for name, value in figures.items() if isinstance(value, float)}
    return Facts(kept, f"{len(split.images):,} {SPLIT} images of {config.data.name}")


def page(joint: Joint, path: str, facts: Facts, options: ServeOptions) -> str:
    """The tab About, as HTML."""
    import jax

    names, data = choices.class_names(joint), joint.dataset
    height, width, channels = joint.image_shape
    sizes = ", ".join(f"{split} {count:,}" for split, count in data.get("splits", {}).items())
    count = sum(x.size for x in jax.tree.leaves(joint.params))
    kind = "attributes" if joint.model.multi_label else "classes"
    rows = [
        ("checkpoint", f"{path}, step {joint.step}"),
        ("images", f"{width} × {height}, {'grey' if channels == 1 else 'RGB'}"),
        (kind, f"{len(names)}: {', '.join(names[:40])}{' …' if len(names) > 40 else ''}"),
        ("trained on", f"{joint.config.data.name}{f' ({sizes} images)' if sizes else ''}"),
        ("network", f"{count:,} parameters, predicts {joint.config.diffusion.prediction}"),
        ("weights", joint.digest),
    ]
    measured = [(name.replace("_", " "), number(value)) for name, value in facts.figures.items()]
    parts = [
        "<h3>The model</h3>",
        show.table(rows),
        f"<h3>Measured{f' on {html.escape(facts.of)}' if facts.of else ''}</h3>",
        show.table(measured) if measured else f"<p>{UNKNOWN}</p>",
        "<h3>Pictures that you upload</h3>",
        f"<p>At most {options.megabytes} MB and {options.megapixels} million pixels. They are kept "
        "in memory while they are looked at, and written to no file. The page calls no other "
        "server.</p>",
        "<h3>Config</h3>",
        f"<details><summary>all keys</summary><pre>{_config(joint)}</pre></details>",
    ]
    return f'<div class="jdm-about">{"".join(parts)}</div>'


def _config(joint: Joint) -> str:
    return html.escape(json.dumps(json.loads(joint.config.to_json_best_effort()), indent=2))
