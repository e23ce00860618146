"""Pytrees compared by the names of their arrays, for errors that say what does not fit, and by what
is in them."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np


class Difference(NamedTuple):
    """An array that differs between two trees. wanted, found: "float32[3, 8]", or "nothing"."""

    path: str
    wanted: str
    found: str


def leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a pytree, with paths such as "params/unet/stem/kernel"."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def describe(leaf: Any) -> str:
    """The dtype and shape of an array; "nothing" of None."""
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def differences(wanted: Any, found: Any) -> list[Difference]:
    """Every array that differs in shape or dtype, or is missing in one of two pytrees."""
    wanted, found = leaves(wanted), leaves(found)
    every = [Difference(p, describe(wanted.get(p)), describe(found.get(p))) for p in wanted | found]
    return [one for one in every if one.wanted != one.found]


def digest(arrays: Iterable[Any]) -> str:
    """16 hexadecimal digits that identify the contents of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]
