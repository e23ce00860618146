"""What is said of a model that others are given: its config without paths, and its model card.

Owns which parts of a config and a report are paths of this machine, and the text of the card, which
is Markdown below a header in YAML, as the Hugging Face Hub reads it. Sends nothing.
"""

import copy
import importlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import jdm
from jdm.analysis.report import Report, floats, settings, table
from jdm.config import config_to_dict
from jdm.errors import InvalidValue
from jdm.hub import LIBRARY, Address
from jdm.joint import Joint
from jdm.names import FOLDER, SPLITS
from jdm.pretrained import PRETRAINED

SHOWN = 20  # names of classes in a card
# What the hub calls the tasks, and the evaluators that measure the second one.
CLASSIFICATION, GENERATION = "image-classification", "unconditional-image-generation"
TASKS = {"likelihood": GENERATION, "generation": GENERATION}


def without_path(name: str) -> str:
    """A data set's name without the path of a folder: "folder:/home/me/pets" is "folder:pets"."""
    if not name.startswith(FOLDER):
        return name
    return FOLDER + name.removeprefix(FOLDER).rstrip("/").rpartition("/")[2]


def public_config(joint: Joint) -> dict[str, Any]:
    """The config as JSON, without paths of this machine."""
    values = copy.deepcopy(config_to_dict(joint.config))
    data, train = values["data"], values["train"]
    data.update(dir="", cache_dir="", name=without_path(data["name"]))
    data["unlabelled"] = without_path(data["unlabelled"])
    values["eval"]["ood"] = without_path(values["eval"]["ood"])
    source = train["init_from"]
    if source not in PRETRAINED and not source.startswith("hf:"):
        train["init_from"] = source.rstrip("/").rpartition("/")[2]
    return json.loads(json.dumps(values))


def public_dataset(joint: Joint) -> dict[str, Any]:
    """What the data was, see `Joint.dataset`, without paths of this machine."""
    found = json.loads(json.dumps(dict(joint.dataset), default=list))
    for one in filter(None, (found, found.get("unlabelled"))):
        one["name"] = without_path(one.get("name", ""))
    return found


def public_report(report: Report, at: Address) -> Report:
    """A report whose protocol names the model by its address, and no path of this machine."""
    protocol = {
        name: without_path(value) if isinstance(value, str) else value
        for name, value in report.protocol.items()
    }
    return Report(protocol | {"checkpoint": str(at)}, report.results)


def check_report(joint: Joint, report: Report, path: str) -> None:
    """Raises InvalidValue where a report is of other weights than those of the model."""
    if report.protocol.get("weights") != joint.digest:
        of = f"step {report.protocol['step']} of {report.protocol['checkpoint']}"
        allowed = f"is of other weights: those of {of}, and not those of step {joint.step}"
        raise InvalidValue("report", path, allowed, "run jdm eval on this checkpoint")


def card(joint: Joint, at: Address, report: Report | None, license: str | None) -> str:
    """The model card, README.md. report: of these weights, as `public_report` gives it.

    Raises Failure without huggingface_hub, which writes the header.
    """
    model, shape = joint.model, "×".join(map(str, joint.image_shape))
    name, kind = at.repository.partition("/")[2], "attributes" if model.multi_label else "classes"
    does = " and ".join(
        ["generates images"] * joint.has_diffusion + ["classifies them"] * joint.has_classifier
    )
    lines = [
        f"---\n{header(joint, name, report, license)}\n---",
        f"# {name}",
        f"A joint diffusion model: one network that {does}. Images of {shape} pixels, "
        f"{model.num_classes} {kind}. Published with jdm {jdm.__version__}.",
        "## Use",
        "```\npip install 'jdm[hub]'\n```",
        _use(joint, str(at)),
        "## Model",
        *_table([["", ""], *_facts(joint)]),
        "## Data",
        *_data(joint),
        "## Figures",
    ]
    if report is None:
        lines.append("None: no report came with this model.")
    else:
        for evaluator, found in report.results.items():
            if rows := floats(found):
                lines += [f"### {evaluator}", f"{_title(report)}.", *_table(rows)]
        lines += ["### Protocol", *_table(settings(report.protocol))]
    return "\n\n".join(line.rstrip("\n") for line in lines) + "\n"


def header(joint: Joint, name: str, report: Report | None, license: str | None) -> str:
    """The header of the card in YAML: what the hub searches and shows."""
    cards = importlib.import_module("huggingface_hub.repocard_data")
    results = (
        []
        if report is None
        else [
            cards.EvalResult(
                task_type=TASKS.get(evaluator, CLASSIFICATION),
                dataset_type=str(report.protocol["data"]),
                dataset_name=str(report.protocol["data"]),
                dataset_split=str(report.protocol["split"]),
                metric_type=metric,
                metric_name=f"{metric}, seed {report.protocol['seed']}",
                metric_value=value,
            )
            for evaluator, found in report.results.items()
            for metric, value in found.items()
            if isinstance(value, float) and np.isfinite(value)
        ]
    )
    data = cards.ModelCardData(
        library_name=LIBRARY,
        license=license,
        pipeline_tag=GENERATION if joint.has_diffusion else CLASSIFICATION,
        tags=["jax", "flax", "diffusion", "joint-diffusion", CLASSIFICATION],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _use(joint: Joint, address: str) -> str:
    lines = ["```python", "import jdm", "", f'joint = jdm.load("{address}")']
    if joint.has_diffusion:
        labels = "n=3" if joint.model.multi_label or not joint.has_classifier else "labels=[0, 1]"
        lines.append(f"samples = jdm.sample(joint, {labels})")
        lines.append("samples.images  # uint8 [N, H, W, C]; a notebook shows `samples` as a grid")
    if joint.has_classifier:
        of = "samples.images" if joint.has_diffusion else "images"
        lines.append(f"jdm.classify(joint, {of})  # probabilities, float32 [N, K]")
    return "\n".join([*lines, "```"])


def _facts(joint: Joint) -> list[list[str]]:
    config, model = joint.config, joint.model
    count = sum(leaf.size for leaf in jax.tree.leaves(joint.params))
    diffusion = config.diffusion
    return [
        ["parameters", f"{count:,}"],
        ["step", "unknown" if joint.step is None else f"{joint.step:,}"],
        ["noise levels", f"T = {diffusion.steps}, schedule {diffusion.schedule}"],
        ["prediction", diffusion.prediction],
        ["loss", ", ".join(config.loss.terms)],
        ["classifier", model.head if joint.has_classifier else "not trained"],
        ["digest of the weights", f"`{joint.digest}`"],
    ]


def _data(joint: Joint) -> list[str]:
    dataset = public_dataset(joint)
    name = without_path(dataset.get("name") or joint.config.data.name)
    counts = dataset.get("splits", {})
    contents = dataset.get("contents", {})
    rows = [
        [split, f"{counts[split]:,}", f"`{contents.get(split, 'unknown')}`"]
        for split in sorted(counts, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS))
    ]
    lines = [f"Trained on `{name}`."]
    if rows:
        lines += _table([["split", "images", "digest of the contents"], *rows])
    if names := joint.class_names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        listed = ", ".join(f"{k} {one}" for k, one in enumerate(names[:SHOWN]))
        lines.append(f"Classes: {listed}{more}.")
    return lines


def _title(report: Report) -> str:
    """What the figures are of, which stands beside them."""
    p: Mapping[str, Any] = report.protocol
    return f"Step {p['step']}, {p['data']} {p['split']} ({p['images']:,} images), seed {p['seed']}"


def _table(rows: list[list[str]]) -> list[str]:
    return ["\n".join(table(rows))]
