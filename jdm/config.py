"""Configs: found by name, overridden from the command line, checked before anything else happens.

Owns the loading, the checks and the comparison of configs. Imports no JAX, so that a misspelt key
stops a run in its first second. The names in CHOICES are those of the dicts that stand beside
their functions; the tests hold the two together.
"""

import difflib
import functools
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import jdm.configs
from jdm.configs import base

_DATASETS = ("digits", "mnist", "fashion_mnist", "svhn_cropped", "cifar10", "cifar100", "celeb_a")
_DATASETS += ("malaria",)

CHOICES: dict[str, tuple[str, ...]] = {
    "model.resample": ("conv", "resblock"),
    "model.attention_order": ("head_first", "qkv_first"),
    "model.head": ("normalised", "published"),
    "model.head_time": ("raw", "zero"),
    "model.dtype": ("float32", "bfloat16"),
    "diffusion.schedule": ("linear", "linear_ddpm", "cosine"),
    "diffusion.prediction": ("eps", "x0", "v", "previous"),
    "diffusion.variance": ("fixed_small", "fixed_large", "learned"),
    "loss.terms": ("joint", "diffusion", "classifier"),
    "loss.kind": ("mse", "kl", "rescaled_kl"),
    "loss.classify": ("clean", "noised", "both"),
    "loss.augment": ("none", "published", "repaired", "digits", "natural"),
    "optim.schedule": ("constant", "cosine"),
    "train.t_sampler": ("uniform", "loss_second_moment"),
    "eval.split": ("validation", "test", "train"),
    "data.name": _DATASETS,
    "data.unlabelled": ("", *_DATASETS),
}

# Beside their names, these may be "folder:" and a path.
FOLDERS = ("data.name", "data.unlabelled")

_POSITIVE = (lambda v: v > 0, "positive")
_NOT_NEGATIVE = (lambda v: v >= 0, "0 or more")
_FRACTION = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_SHARE = (lambda v: 0 < v <= 1, "above 0 and at most 1")
_SEED = (lambda v: 0 <= v < 2**31, "between 0 and 2147483647")
_CLASSES = (
    lambda v: all(isinstance(c, int) and c >= 0 for c in v) and len(set(v)) == len(v) != 1,
    "two or more different whole numbers from 0 up, or ()",
)
_SIDES = (lambda v: all(isinstance(s, int) and s > 0 for s in v), "positive whole numbers")
_LEVELS = (lambda v: len(v) > 0 and _SIDES[0](v), "one or more positive whole numbers")

RANGES: dict[str, tuple] = {
    "seed": _SEED,
    **dict.fromkeys(
        ("data.batch_size", "model.image_size", "model.image_channels", "model.channels")
        + ("model.num_classes", "model.blocks", "model.heads", "model.head_width", "optim.lr")
        + ("diffusion.steps", "train.steps", "train.accumulate", "eval.batch_size")
        + ("checkpoint.keep",),
        _POSITIVE,
    ),
    **dict.fromkeys(
        (
            "loss.weight",
            "loss.classify_after",
            "loss.min_snr_gamma",
            "loss.variance_weight",
            "optim.warmup_steps",
        )
        + ("optim.weight_decay", "optim.clip_norm", "log.every", "eval.every", "checkpoint.every")
        + ("data.workers", "data.limit", "data.labelled_per_class"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        ("model.dropout", "model.head_dropout", "optim.b1", "optim.b2", "train.ema_decay")
        + ("data.validation",),
        _FRACTION,
    ),
    "data.labelled_fraction": _SHARE,
    "data.classes": _CLASSES,
    "model.multipliers": _LEVELS,
    "model.attention": _SIDES,
}

# What a run may change when it is resumed: how long it goes on, and what it says and keeps.
RESUMABLE = ("train.steps", "data.dir", "data.cache_dir", "data.workers", "log.", "eval.")
RESUMABLE += ("checkpoint.",)


class ConfigError(ValueError):
    """A config, or a flag that overrides it, that cannot be right; the message is one sentence."""


def names() -> list[str]:
    """The configs that can be asked for by name; those of a sub-folder as "folder/name"."""
    prefix = f"{jdm.configs.__name__}."
    found = pkgutil.walk_packages(jdm.configs.__path__, prefix)
    files = (module.name.removeprefix(prefix) for module in found if not module.ispkg)
    return sorted(name.replace(".", "/") for name in files if name != "base")


def load(name: str, overrides: list[str] = ()) -> ConfigDict:
    """The config of that name (or at that path, *.py), overridden and checked; it is locked.

    overrides: flags of the form --config.section.key=value.

    Raises ConfigError, in one sentence, for an unknown name, key, type or value.
    """
    config = _read(name)
    check(config, name)
    flags_of = flags.FlagValues()
    argv = ["jdm", *overrides]
    for flag in overrides:
        _check_key(flag.removeprefix("--config.").split("=")[0])
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=flags_of, sys_argv=argv)
        flags_of(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_explain(overrides, error)) from error
    check(config, "the command line")
    return config


def _read(name: str) -> ConfigDict:
    """What get_config() of a named config or of a file returns."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"--config={name} is not a file")
        spec = importlib.util.spec_from_file_location("jdm_user_config", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif name in names():
        module = importlib.import_module(f"jdm.configs.{name.replace('/', '.')}")
    else:
        raise ConfigError(
            f"--config={name} is unknown; known: {', '.join(names())}, or the path of a .py file"
        )
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={name} defines no get_config()")
    return module.get_config()


def _explain(overrides: list[str], error: Exception) -> str:
    """One sentence on why flags could not be parsed, naming the one at fault."""
    defaults = flatten(base.get_config())
    for flag in overrides:
        key, separator, value = flag.removeprefix("--config.").partition("=")
        if not separator:
            return f"--config.{key} needs a value: --config.{key}=…"
        try:
            one = flags.FlagValues()
            argv = ["jdm", flag]
            config_flags.DEFINE_config_dict(
                "config", base.get_config(), flag_values=one, sys_argv=argv
            )
            one(argv)
        except (flags.Error, TypeError, ValueError):
            kind = type(defaults[key]).__name__ if key in defaults else "section"
            return f"--config.{key}={value} is not of the type {kind}"
    return str(error).splitlines()[0]


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a nested config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@functools.cache
def _defaults() -> dict[str, Any]:
    """Every key there is, with its default."""
    return flatten(base.get_config())


def _check_key(key: str) -> None:
    known = _defaults()
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
        raise ConfigError(f"config.{key} is unknown{hint}")


def _check_folder(key: str, value: str) -> None:
    """Raises ConfigError for what is not one of the choices, unless it may be and is a folder."""
    if key in FOLDERS and value.startswith("folder:"):
        return
    known = [*filter(None, CHOICES[key]), *(["folder:/path"] if key in FOLDERS else [])]
    nearest = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ConfigError(f"config.{key}={value!r} is unknown; known: {', '.join(known)}{hint}")


def check(config: ConfigDict, where: str) -> None:
    """Raises ConfigError for an unknown or missing key, a wrong type, name or range.

    where: what the config was read from, for the message.
    """
    defaults, values = _defaults(), flatten(config)
    for key in values:
        _check_key(key)
    for key, default in defaults.items():
        if key not in values:
            raise ConfigError(f"config.{key} is missing from {where}; start from base.get_config()")
        value = values[key]
        whole_as_float = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not whole_as_float:
            raise ConfigError(
                f"config.{key}={value!r} is of the type {type(value).__name__}; "
                f"it must be {type(default).__name__}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{key}={value!r} must be finite")
        if key in CHOICES and value not in CHOICES[key]:
            _check_folder(key, value)
        if key in RANGES and not RANGES[key][0](value):
            raise ConfigError(f"config.{key}={value!r} must be {RANGES[key][1]}")
    if (values["diffusion.variance"] == "learned") != values["model.learned_variance"]:
        raise ConfigError(
            f"config.model.learned_variance={values['model.learned_variance']} does not go with "
            f"config.diffusion.variance={values['diffusion.variance']!r}; learned needs True, "
            "the fixed ones False"
        )
    per_class = values["data.labelled_per_class"]
    if per_class and (values["data.labelled_fraction"] < 1 or values["model.multi_label"]):
        raise ConfigError(
            f"config.data.labelled_per_class={per_class} goes neither with "
            f"config.data.labelled_fraction={values['data.labelled_fraction']} below 1 nor with "
            "config.model.multi_label=True"
        )
    if values["data.batch_size"] % values["train.accumulate"]:
        raise ConfigError(
            f"config.data.batch_size={values['data.batch_size']} does not divide by "
            f"config.train.accumulate={values['train.accumulate']}"
        )
    if values["model.head"] == "published" and (
        values["data.batch_size"] // values["train.accumulate"] < 2
    ):
        raise ConfigError(
            f"config.data.batch_size={values['data.batch_size']} over "
            f"config.train.accumulate={values['train.accumulate']} is too few for "
            "config.model.head='published', which normalises over the batch; 2 or more are allowed"
        )


def to_dict(config: ConfigDict) -> dict:
    """The config as plain dicts, ready for JSON."""
    return config.to_dict()


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """A config read back from JSON, where tuples became lists; checked like any other."""
    config = base.get_config()
    for key, value in flatten(values).items():
        _check_key(key)
        section, _, name = key.rpartition(".")
        target = config[section] if section else config
        with target.ignore_type():  # `check` says it in one sentence
            target[name] = tuple(value) if isinstance(value, list) else value
    check(config, "the checkpoint")
    return config.lock()


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """One "key: old -> new" for every value that differs and that resuming may not change."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key in before
        if before[key] != after[key] and not key.startswith(RESUMABLE)
    ]
