"""Checks that a config and a data set fit together.

Owns the comparison of a config with the facts about its data set, and of the labels that were read
with the model. Every error is an InvalidValue that names the config key.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from jdm.data.datasets import Dataset
from jdm.data.labels import Labels
from jdm.data.lookup import dataset
from jdm.data.splits import ReadOptions, check_classes, split_names
from jdm.errors import InvalidValue
from jdm.files import local_path


def check_config_fits(data: ConfigDict, model: ConfigDict, evaluation: ConfigDict) -> Dataset:
    """Checks three sections of a config against its data sets; returns the facts about data.name.

    evaluation: the section eval. Reads no image.

    Raises InvalidValue for an unknown data set, for classes or a split that it does not have, for a
    model of images or labels of other shapes, and for a folder that is not local.
    """
    for key in ("dir", "cache_dir"):
        if data[key]:
            local_path(f"config.data.{key}", data[key])
    facts = dataset(data.name)
    seconds = {"config.data.unlabelled": data.unlabelled, "config.eval.ood": evaluation.ood}
    for key, name in seconds.items():
        try:
            if name:
                dataset(name)
        except InvalidValue as error:
            raise error.about(key) from None
    check_classes(data.classes, facts)
    for key, allowed in (
        ("image_size", facts.sizes),
        ("image_channels", (facts.channels,) if facts.channels else (1, 3)),
        ("num_classes", (len(data.classes) or facts.num_classes,)),
        ("multi_label", (facts.multi_label,)),
    ):
        if allowed and model[key] not in allowed:
            has = f"{data.name!r}, which has {' or '.join(map(str, allowed))}"
            kept = f" with config.data.classes={data.classes}" if data.classes else ""
            does_not_fit = f"does not fit config.data.name={has}{kept}"
            raise InvalidValue(f"config.model.{key}", model[key], does_not_fit)
    splits = split_names(facts, data.validation)
    if evaluation.split not in splits:
        absent = f"does not exist: config.data.name={data.name!r} has {', '.join(splits)}"
        hint = f"config.data.validation={data.validation} is the share of train that is held out"
        raise InvalidValue("config.eval.split", evaluation.split, absent, hint)
    return facts


def check_labels(labels: Labels, num_classes: int, multi_label: bool) -> None:
    """Raises InvalidValue for labels of another shape or range than the model's.

    labels: integers [N] in [-1, num_classes), or [N, num_classes] in {-1, 0, 1} with multi_label.
    """
    shape = (len(labels), num_classes) if multi_label else (len(labels),)
    wrong = labels[(labels < -1) | (labels > (1 if multi_label else num_classes - 1))]
    if labels.shape != shape:
        problem = f"needs labels of the shape {shape}, but the data set has {labels.shape}"
    elif wrong.size:
        problem = f"does not allow the label {wrong[0]}, which the data set has"
    else:
        return
    with_multi_label = f"with config.model.multi_label={multi_label} {problem}"
    raise InvalidValue("config.model.num_classes", num_classes, with_multi_label)


def check_not_empty(
    train: Labels, evaluated: np.ndarray, data: ConfigDict, evaluation: ConfigDict
) -> None:
    """Raises InvalidValue where a run has no training image or no labelled image to evaluate on.

    train, evaluated: the labels of the training images and of the split config.eval.split.
    """
    if not len(train) or not (evaluated >= 0).any():
        split = f"(config.eval.split={evaluation.split!r})"
        others = f"{len(evaluated):,} images to evaluate on {split}"
        leaves = f"leaves {len(train):,} images to train on, and {others}"
        hint = "training needs images, and evaluation needs labelled images"
        raise InvalidValue("config.data.validation", data.validation, leaves, hint)


def evaluation_options(
    name: str, data: ConfigDict, model: ConfigDict, data_dir: str = ""
) -> ReadOptions:
    """The options for reading the data set `name` in order to evaluate a model on it.

    data, model: sections of the model's config. data_dir: where `name` is prepared; "" is
    config.data.dir. config.data.classes are selected from `name` too. The exception is a data set
    other than the model's with exactly num_classes classes: all of them are kept, in their order.

    Raises InvalidValue for an unknown data set, and where the number or kind of classes differs.
    """
    facts, options = dataset(name), ReadOptions.of(data, model)
    applies = name == data.name or facts.num_classes != model.num_classes
    classes = options.classes if applies else ()
    check_classes(classes, facts)
    count = len(classes) or facts.num_classes
    if count != model.num_classes or facts.multi_label != model.multi_label:
        kinds = {False: "classes", True: "attributes"}
        has = f"has {count} {kinds[facts.multi_label]}"
        knows = f"this model knows {model.num_classes} {kinds[model.multi_label]}"
        raise InvalidValue("config.data.name", name, has, knows)
    return dataclasses.replace(options, data_dir=data_dir or data.dir, classes=classes, workers=0)


def ood_options(data: ConfigDict, model: ConfigDict, data_dir: str = "") -> ReadOptions:
    """The options for reading a second data set, of other classes, in order to tell its images from
    those of the model's. They get the model's size and channels. The arguments are those of
    `evaluation_options`."""
    options = ReadOptions.of(data, model)
    return dataclasses.replace(options, data_dir=data_dir or data.dir, classes=(), workers=0)
