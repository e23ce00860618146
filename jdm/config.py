"""Loading, overriding, migrating, checking and comparing configs.

The keys and their allowed values are declared in jdm.configs.base. Imports no JAX, so that a run
with a misspelt key stops at once. Every error is an InvalidValue that names the key.
"""

import importlib
import math
import pkgutil
import runpy
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jdm.configs
from jdm.configs import base
from jdm.errors import NO_VALUE, InvalidValue
from jdm.files import local_path
from jdm.names import check_name, did_you_mean, metric_of
from jdm.options import Option

# Keys that version 1 renamed: {old: new}.
MOVED = {
    "model.dtype": "exec.dtype",
    "model.remat": "exec.remat",
    "train.accumulate": "exec.accumulate",
}
# Values that were renamed: {key: {the old one, as text: new}}.
RENAMED = {"exec.remat": {"False": "none", "True": "blocks"}}
# Keys that were added since version 1, with the value that they had before.
ADDED: dict[str, Any] = {
    "model.head_channels": 0,
    "model.time_conditioning": "scale_shift",
    "exec.attention": "auto",  # was "xla"; they differ by rounding errors
    "exec.mesh": "data",
    "train.patience": 0,
    "checkpoint.keep_every": 0,
    "eval.samples": 1000,
    "eval.bound_steps": 50,
    "eval.features": "reference",
    "eval.ood": "",
    "checkpoint.best": "",
}
# Version 0 had a single name in loss.terms: {old name: terms}. Its other names were those of terms.
TERMS_0 = {"joint": ("diffusion", "classifier")}


def config_names() -> list[str]:
    """The names of the packaged configs, such as "digits" and "reference/cifar10"."""
    prefix = f"{jdm.configs.__name__}."
    found = pkgutil.walk_packages(jdm.configs.__path__, prefix)
    files = (module.name.removeprefix(prefix) for module in found if not module.ispkg)
    return sorted(name.replace(".", "/") for name in files if name != "base")


def load_config(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The packaged config of that name, or the config file (*.py) at that path; checked and locked.

    overrides: flags of the form --config.section.key=value.

    Raises InvalidValue for an unknown name, key, type or value.
    """
    values = flatten(_read(name))
    for flag in overrides:
        key, equals, text = flag.removeprefix("--config.").partition("=")
        if not equals:
            raise InvalidValue(f"--config.{key}", NO_VALUE, f"needs a value: --config.{key}=…")
        option = _option(MOVED.get(key, key))
        values[key] = option.read(f"config.{key}", text)
    return _checked(migrate(values), name)


def _read(name: str) -> ConfigDict:
    """The result of get_config() in a packaged config or a file.

    Raises InvalidValue, with the file and the line, for an error in it.
    """
    is_file = name.endswith(".py")
    path = local_path("config", name) if is_file else f"configs/{name}.py"
    if is_file and not Path(path).is_file():
        raise InvalidValue("config", name, "is not a file")
    if not is_file:
        check_name("config", name, [*config_names(), "the path of a .py file"])
    try:
        if is_file:
            found = runpy.run_path(path)
        else:
            found = vars(importlib.import_module(f"jdm.configs.{name.replace('/', '.')}"))
        if "get_config" not in found:
            raise InvalidValue("config", name, "defines no get_config()")
        config = found["get_config"]()
    except InvalidValue:
        raise
    except (Exception, SystemExit) as error:  # whatever the file does
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        line = _line(error, path)
        raise InvalidValue("config", name, f"fails{line}: {cause}") from error
    if not isinstance(config, Mapping | ConfigDict):
        got, hint = type(config).__name__, "it must end in: return config"
        raise InvalidValue("config", name, f"has a get_config() that returns {got}", hint)
    return config


def _line(error: BaseException, path: str) -> str:
    """ " in line 7" of a file, where an error was raised or passed through it."""
    if isinstance(error, SyntaxError) and (error.filename or "").endswith(path):
        return f" in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename.endswith(path)]
    return f" in line {lines[-1]}" if lines else ""


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a nested config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


OPTIONS: dict[str, Option] = flatten(base.KEYS)


def _option(key: str) -> Option:
    if key not in OPTIONS:
        hint = did_you_mean(key, OPTIONS) or f"known: {', '.join(OPTIONS)}"
        raise InvalidValue(f"config.{key}", NO_VALUE, "is unknown", hint)
    return OPTIONS[key]


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """A flat config of any version, as one of the current version.

    A key that is newer than the config gets the value that reproduces the old behaviour. A renamed
    key is renamed in configs of every version, with a warning where the config is a current one.

    Raises InvalidValue for a version that is newer than this code.
    """
    version = values.get("version", 0)
    OPTIONS["version"].check("config.version", version)
    if version > base.VERSION:
        allowed = f"is newer than {base.VERSION}, the newest known here"
        raise InvalidValue("config.version", version, allowed, "a newer jdm reads it")
    values = ADDED | values
    for old in MOVED.keys() & values.keys():
        if version > 0:
            warnings.warn(f"config.{old} is called config.{MOVED[old]} now", stacklevel=2)
        values[MOVED[old]] = values.pop(old)
    values = _renamed(values)
    if isinstance(values.get("loss.terms"), str):
        values["loss.terms"] = TERMS_0.get(values["loss.terms"], (values["loss.terms"],))
    if version == 0:
        values.setdefault("eval.metrics", ("classification",))
    return values | {"version": base.VERSION}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """With the names of today for the values of RENAMED."""

    def of(key: str, value: Any) -> Any:
        return RENAMED.get(key, {}).get(str(value).capitalize(), value)  # flags may say "true"

    return {key: of(key, value) for key, value in values.items()}


def _checked(values: dict[str, Any], where: str) -> ConfigDict:
    """The locked config with these flat values. where: their source, for the error."""
    config = base.get_config()
    for key, value in values.items():
        _option(key)
        section, _, name = key.rpartition(".")
        target = config[section] if section else config
        if isinstance(value, list):  # of JSON
            value = tuple(value)
        elif type(value) is int and isinstance(OPTIONS[key].default, float):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf  # `check_config` reports it
        with target.ignore_type():  # `check_config` reports it
            target[name] = value
    for key in OPTIONS:
        if key not in values:
            allowed = f"is missing from {where}; start from base.get_config()"
            raise InvalidValue(f"config.{key}", NO_VALUE, allowed)
    check_config(config)
    return config.lock()


def check_config(config: ConfigDict) -> None:
    """Raises InvalidValue for a value of the wrong type, an unknown name, one out of range, and
    for values that are allowed alone but not together."""
    values = flatten(config)
    for key, value in values.items():
        _option(key).check(f"config.{key}", value)
    if (values["diffusion.variance"] == "learned") != values["model.learned_variance"]:
        allowed = f"does not go with config.diffusion.variance={values['diffusion.variance']!r}"
        key, hint = "model.learned_variance", "learned needs True, the fixed ones False"
        raise InvalidValue(f"config.{key}", values[key], allowed, hint)
    per_class, fraction = values["data.labelled_per_class"], values["data.labelled_fraction"]
    if per_class and (fraction < 1 or values["model.multi_label"]):
        allowed = (
            f"goes neither with config.data.labelled_fraction={fraction} below 1 nor with "
            "config.model.multi_label=True"
        )
        raise InvalidValue("config.data.labelled_per_class", per_class, allowed)
    rows, parts = values["data.batch_size"], values["exec.accumulate"]
    if rows % parts:
        allowed = f"does not divide by config.exec.accumulate={parts}"
        raise InvalidValue("config.data.batch_size", rows, allowed)
    if values["model.head"] == "published" and rows // parts < 2:
        allowed = (
            f"over config.exec.accumulate={parts} is too few for config.model.head='published', "
            "which normalises over the batch; 2 or more are allowed"
        )
        raise InvalidValue("config.data.batch_size", rows, allowed)
    _check_evaluation(values)


def _check_evaluation(values: Mapping[str, Any]) -> None:
    """Raises InvalidValue where an evaluation during training lacks what it needs."""
    best, metrics = values["checkpoint.best"], values["eval.metrics"]
    metric = metric_of(best) if best else None
    if metric and metric.evaluator not in metrics:
        allowed = f"needs {metric.evaluator!r} among config.eval.metrics={metrics}"
        raise InvalidValue("config.checkpoint.best", best, allowed)
    if values["train.patience"] and not best:
        allowed = "needs config.checkpoint.best, the metric that has to improve"
        raise InvalidValue("config.train.patience", values["train.patience"], allowed)
    if "ood" in metrics and not values["eval.ood"]:
        allowed = "holds 'ood', which needs config.eval.ood, a second data set"
        raise InvalidValue("config.eval.metrics", metrics, allowed)


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain dicts, ready for JSON."""
    return config.to_dict()


def config_from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """A checked and locked config from JSON, of this version or an older one."""
    return _checked(migrate(flatten(values)), "the stored config")


def with_exec(config: ConfigDict, **exec_values: Any) -> ConfigDict:
    """The config with these values in its section exec. Raises InvalidValue for a wrong one."""
    values = flatten(config)
    for name, value in exec_values.items():
        check_name("exec", name, list(config.exec))
        values[f"exec.{name}"] = value
    return _checked(_renamed(values), "the config")


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """ "key: old -> new" for each difference in a key that must not change when a run resumes."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key, option in OPTIONS.items()
        if before[key] != after[key] and not option.resumable
    ]
