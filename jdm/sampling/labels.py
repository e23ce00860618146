"""Labels and seeds: parsed from text, checked, and converted to arrays of one length.

A label says what an image should show: a class, a distribution over classes, attributes on and off,
or nothing. Imports no JAX. Every error is an InvalidValue about "labels", "seeds" or "n".
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt32

from jdm.errors import NO_VALUE, InvalidValue
from jdm.names import did_you_mean
from jdm.options import is_float

Numbers = Sequence[Any] | np.ndarray  # the entries are checked at run time, in this file
Weights = dict[int | str, float]  # {class: weight} of one label
TOLERANCE = 2e-3  # how far the sum of probabilities may be from 1: as far as bfloat16 rounds


def _wrong(allowed: str, parameter: str = "labels", hint: str = "") -> InvalidValue:
    return InvalidValue(parameter, NO_VALUE, allowed, hint)


def parse_numbers(parameter: str, text: str, most: int | None = None) -> list[int]:
    """[0, 1, 2, 3, 9] of "0-3,9". most: how many are allowed. Raises InvalidValue."""
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            allowed = "is not a list of whole numbers and ranges, such as 0-63 or 1,5"
            raise InvalidValue(parameter, text, allowed)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            allowed = f"has the range {part}, whose end is before its start"
            raise InvalidValue(parameter, text, allowed)
        if last >= 2**32:  # refused before the list would fill the memory
            raise InvalidValue(parameter, text, f"has {last}; it must be below 2**32")
        if most is not None and len(found) + last - first >= most:
            raise InvalidValue(parameter, text, f"has too many numbers; at most {most} are allowed")
        found += range(first, last + 1)
    return found


def parse_labels(text: str) -> list[Weights]:
    """The label of each image as {class: weight}: [{3: 1}, {}, {3: 0.7, 5: 0.3}, {3: 1, 5: 0}] of
    "3,none,3:0.7+5:0.3,3+!5". The range 0-9 is ten labels. Anything but a number is the name of a
    class, for `cycled`: {"cat": 0.5, "dog": 0.5} of "cat:0.5+dog:0.5". Raises InvalidValue."""
    found: list[Weights] = []
    for part in text.split(","):
        if part == "none":
            found.append({})
        elif all(piece.isdecimal() for piece in part.split("-")):
            found += [{label: 1.0} for label in parse_numbers("labels", part)]
        else:
            pieces = [_parse_weight(text, piece) for piece in part.split("+")]
            found.append(dict(pieces))
            if len(found[-1]) < len(pieces):
                raise InvalidValue("labels", text, f"names a class twice in {part}")
    return found


def _parse_weight(text: str, piece: str) -> tuple[int | str, float]:
    """(class, weight) of "3", "!3", "3:0.7" or "cat:0.7"."""
    off = piece.startswith("!")
    label, colon, weight = piece.removeprefix("!").partition(":")
    try:
        if not label or (colon and off):
            raise ValueError
        name = int(label) if label.isdecimal() else label
        return name, float(weight) if colon else float(not off)
    except ValueError:
        allowed = "is not a list such as 0-9, 3,none,5, 3:0.7+5:0.3 or 3+!5"
        raise InvalidValue("labels", text, allowed) from None


def cycled(
    weights: list[Weights],
    n: int,
    num_classes: int,
    multi_label: bool,
    class_names: Sequence[str] = (),
) -> Numbers:
    """Parsed labels, repeated until there are n, in the form that `jdm.sample` takes.

    class_names: of the model; () where it knows none, and labels must be numbers.
    """
    numbered = [{_number(k, class_names): v for k, v in one.items()} for one in weights]
    for named, one in zip(weights, numbered, strict=True):
        if len(one) < len(named):
            raise _wrong(f"name a class twice in {'+'.join(map(str, named))}")
    _check_range([label for one in numbered for label in one], num_classes)
    if not multi_label and any(0 in one.values() for one in numbered):
        raise _wrong("ask for a class to be off; an image has one class with this model")
    if len(numbered) > n:
        raise _wrong(f"are {len(numbered)} for {n} seeds; at most as many are allowed")
    numbered = list(itertools.islice(itertools.cycle(numbered), n))
    if not multi_label and all(list(one.values()) in ([], [1.0]) for one in numbered):
        return [next(iter(one), None) for one in numbered]
    rows = np.full((n, num_classes), -1.0 if multi_label else 0.0)
    for row, one in zip(rows, numbered, strict=True):
        row[list(one)] = list(one.values())
    return rows


def _number(label: int | str, class_names: Sequence[str]) -> int:
    """The number of a class that is given by its name, or by its number already."""
    if isinstance(label, int):
        return label
    if not class_names:
        raise _wrong(f"hold {label!r}; this model knows no names, its classes are numbers")
    if label not in class_names:
        known = ", ".join(class_names)
        raise _wrong(
            f"hold {label!r}; the classes are {known}", hint=did_you_mean(label, class_names)
        )
    return list(class_names).index(label)


def label_text(label: Any, names: Sequence[str] = ()) -> str:
    """One label of `check_rows` (an entry or a row) as text that `parse_labels` reads.

    names: of the classes, which stand in place of their numbers; () for numbers.
    """
    known: dict[Any, str] = dict(enumerate(names))
    if label.ndim == 0:
        return "none" if label < 0 else str(known.get(int(label), label))
    if np.issubdtype(label.dtype, np.floating):
        parts = [f"{known.get(k, k)}:{label[k]:.2g}" for k in np.flatnonzero(label)]
    else:
        parts = [f"{'' if label[k] else '!'}{known.get(k, k)}" for k in np.flatnonzero(label >= 0)]
    return "+".join(parts) or "none"


def check_rows(
    n: int | None,
    labels: Numbers | None,
    seeds: Numbers | None,
    num_classes: int,
    multi_label: bool,
) -> tuple[Num[np.ndarray, "n ..."] | None, UInt32[np.ndarray, " n"]]:
    """(labels, seeds), checked and of the length N; see jdm.sampling.samples.Samples."""
    if labels is not None:
        labels = (_attributes if multi_label else _classes)(labels, num_classes)
    if seeds is not None:
        seeds = whole_numbers("seeds", seeds)
        wrong = seeds[(seeds < 0) | (seeds >= 2**32)]
        if wrong.size:
            raise _wrong(f"hold {wrong[0]}; they must lie in [0, 2**32)", "seeds")
    if n is None:
        n = next((len(x) for x in (seeds, labels) if x is not None), 1)
    if n < 1:
        raise InvalidValue("n", n, "must be at least 1")
    seeds = np.arange(n) if seeds is None else seeds
    if len(seeds) != n:
        raise _wrong(f"are {len(seeds)} for n={n} images; there must be as many", "seeds")
    if labels is not None:
        if len(labels) not in (1, n):
            raise _wrong(f"are {len(labels)} for {n} images; 1 or {n} is allowed")
        labels = np.broadcast_to(labels, (n, *labels.shape[1:])).copy()
    return labels, seeds.astype(np.uint32)


def target_weights(
    labels: np.ndarray | None, n: int, num_classes: int, multi_label: bool
) -> Float[np.ndarray, "n m"]:
    """The weight of each class in the log-probability that guidance increases, [N, K].

    With multi_label [N, 2K]: K weights of "attribute k is on", then K of "attribute k is off". An
    image whose row is zero is not guided.
    """
    if labels is None:
        return np.zeros((n, num_classes * (2 if multi_label else 1)), np.float32)
    if multi_label:
        return np.concatenate([labels == 1, labels == 0], axis=1).astype(np.float32)
    if labels.ndim == 2:
        return labels
    return (labels[:, None] == np.arange(num_classes)).astype(np.float32)


def _check_range(labels: Numbers, num_classes: int, least: int = 0) -> None:
    wrong = [label for label in labels if not least <= label < num_classes]
    if wrong:
        allowed = f"hold {wrong[0]}; the classes of this model are 0 to {num_classes - 1}"
        raise _wrong(allowed, hint="None or -1 is an image without guidance")


def _classes(labels: Numbers, num_classes: int) -> np.ndarray:
    """int32 [N], with -1 for None; or probabilities, float32 [N, K]."""
    if isinstance(labels, Iterable) and not isinstance(labels, np.ndarray):
        labels = [-1 if label is None else label for label in labels]
    labels = _array("labels", labels)
    if labels.ndim == 2:
        return _distributions(labels, num_classes)
    labels = whole_numbers("labels", labels)
    _check_range(labels, num_classes, least=-1)
    return labels.astype(np.int32)


def _distributions(rows: np.ndarray, num_classes: int) -> np.ndarray:
    if rows.shape[1] != num_classes or not is_float(rows):
        allowed = f"of two dimensions are probabilities, floats of the shape (N, {num_classes})"
        raise _wrong(f"{allowed}, not {rows.dtype}{rows.shape}")
    rows = rows.astype(np.float32)
    total = rows.sum(axis=1)
    wrong = ~((rows >= 0).all(axis=1) & ((abs(total - 1) <= TOLERANCE) | (total == 0)))
    if wrong.any():
        raise _wrong(
            f"hold the probabilities {rows[wrong][0].tolist()}; they must not be negative and must "
            "sum to 1 (or all be 0, for an image without guidance)"
        )
    return rows


def _attributes(labels: Numbers, num_classes: int) -> np.ndarray:
    """int8 [N, K] of 1 (on), 0 (off) and -1 (not guided)."""
    labels = _array("labels", labels)
    if labels.ndim != 2 or labels.shape[1] != num_classes or not np.isin(labels, (-1, 0, 1)).all():
        raise _wrong(
            f"of a multi-label model have the shape (N, {num_classes}) and hold 1 (on), 0 (off) or "
            f"-1 (not guided), not {labels.dtype}{labels.shape}"
        )
    return labels.astype(np.int8)


def _array(name: str, values: Numbers) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        raise _wrong("must be rows of the same length", name) from None
    if array.ndim == 0:
        raise InvalidValue(name, values, f"must be a list, such as [{values!r}]")
    return array


def whole_numbers(name: str, values: Numbers) -> np.ndarray:
    """A list of whole numbers as an array [N]. Raises InvalidValue for anything else."""
    values = _array(name, values)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise _wrong(f"must be a list of whole numbers, not {values.dtype}{values.shape}", name)
    return values
