"""The names of every closed set: samplers, schedules, heads, data sets and so on.

This module imports no JAX, so that a command can reject a wrong name before JAX is imported. What a
name means is a record, in a dict beside the functions. Each dict is built from the names here:

- by `modules` where the set is a folder with one file for each name, which defines the record. To
  add a member, write the file and add its name here (docs/extending.md);
- by `records` where the records stand in the code.
"""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from jdm.errors import InvalidValue


class Names(tuple[str, ...]):
    """The names of one closed set, in the order in which they are listed."""

    def records(self, *arguments: Any, **records: Any) -> dict[str, Any]:
        """dict() of the arguments: a record for each name. Raises TypeError for other names."""
        found = dict(*arguments, **records)
        if tuple(found) != tuple(self):
            raise TypeError(f"records for {', '.join(found)}; the names are {', '.join(self)}")
        return found

    def modules(self, package: str, attribute: str) -> dict[str, Any]:
        """{name: the attribute of the module <package>.<name>}."""
        modules = {name: importlib.import_module(f"{package}.{name}") for name in self}
        return {name: getattr(module, attribute) for name, module in modules.items()}


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """A hint with the most similar of the known names; "" where none is similar."""
    nearest = difflib.get_close_matches(str(value), list(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else ""


def check_name(parameter: str, value: Any, known: Iterable[str]) -> Any:
    """`value`, if it is one of the known names. Raises InvalidValue, which lists them."""
    known = list(known)
    if value not in known:
        allowed = f"is unknown; known: {', '.join(known)}"
        raise InvalidValue(parameter, value, allowed, did_you_mean(value, known))
    return value


# Data (jdm.data.datasets)
DATASETS = Names("digits mnist fashion_mnist svhn_cropped cifar10 cifar100 celeb_a malaria".split())
FOLDER = "folder:"  # followed by the path of a folder of images, it also names a data set
SPLITS = Names(["train", "validation", "test"])

# The network (jdm.nn)
RESAMPLES = Names(["conv", "resblock"])
ATTENTION_ORDERS = Names(["head_first", "qkv_first"])
TIME_CONDITIONINGS = Names(["scale_shift", "add"])
HEADS = Names(["normalised", "published"])
HEAD_TIMES = Names(["raw", "zero"])
DTYPES = Names(["float32", "bfloat16"])
ATTENTIONS = Names(["auto", "xla", "chunked", "fused"])
REMATS = Names(["none", "attention", "blocks"])

# Files of a state_dict (jdm.torch_files)
WEIGHT_FILES = Names([".pt", ".pth", ".bin", ".ckpt", ".safetensors"])

# The diffusion process (jdm.diffusion.process)
SCHEDULES = Names(["linear", "linear_ddpm", "cosine"])
PREDICTIONS = Names(["eps", "x0", "v", "previous"])
VARIANCES = Names(["fixed_small", "fixed_large", "learned"])

# Training (jdm.training)
TERMS = Names(["diffusion", "classifier"])
LOSS_KINDS = Names(["mse", "kl", "rescaled_kl"])
CLASSIFIED = Names(["clean", "noised", "both"])
POLICIES = Names(["none", "published", "repaired", "digits", "natural"])
LR_SCHEDULES = Names(["constant", "cosine"])
T_SAMPLERS = Names(["uniform", "loss_second_moment"])

# Devices (jdm.mesh)
MESHES = Names(["data", "fsdp"])

# Sampling (jdm.diffusion.samplers, jdm.diffusion.guidance)
SAMPLERS = Names(["ancestral", "ddim", "dpmpp_2m", "heun"])
SPACINGS = Names(["uniform", "quadratic", "log_snr"])
THRESHOLDS = Names(["none", "static", "dynamic"])
GUIDANCE = Names(["none", "pixel", "representation", "published"])
SCALE_SCHEDULES = Names(["constant", "early", "late", "middle"])

# Analysis (jdm.analysis)
EVALUATORS = Names(["classification", "noise", "calibration", "likelihood", "ood", "generation"])
PROBES = Names(["linear", "knn"])
EXPLAIN_STARTS = Names(["noise", "inversion"])  # of counterfactuals
EXTRACTORS = Names(["reference", "joint", "inception"])  # what distances are measured in


class Metric(NamedTuple):
    """A value of which one end is better. evaluator: which yields it. better: "higher", "lower"."""

    evaluator: str
    better: str


METRICS = {
    "accuracy": Metric("classification", "higher"),
    "cross_entropy": Metric("classification", "lower"),
    "brier": Metric("classification", "lower"),
    "mean_average_precision": Metric("classification", "higher"),
    "calibration_error": Metric("calibration", "lower"),
    "bits_per_dimension": Metric("likelihood", "lower"),
    "auroc": Metric("ood", "higher"),
    "agreement": Metric("generation", "higher"),
    "frechet": Metric("generation", "lower"),
    "kid": Metric("generation", "lower"),
    "precision": Metric("generation", "higher"),
    "recall": Metric("generation", "higher"),
    "prd_f8": Metric("generation", "higher"),
    "prd_f1_8": Metric("generation", "higher"),
}


def metric_of(name: str) -> Metric | None:
    """The record of a metric; None for one without a better end.

    name: as an evaluator yields it. It may go on after the name in METRICS, with the number of
    images and a variant: frechet_1000/reference. What is measured on real images, for comparison,
    ends in _real, and has no better end.
    """
    known, _, variant = name.partition("/")
    if variant.endswith("_real"):
        return None
    return METRICS.get(known) or METRICS.get(known.rstrip("0123456789").rstrip("_"))
