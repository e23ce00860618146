"""Files of a PyTorch state_dict: reading and writing arrays by name.

Owns the endings, what is around a state_dict in a file, and what PyTorch's wrappers add to its
names. Does not own which arrays a network has. PyTorch is an extra, imported by the functions that
need it. Files are read without running code that a pickle may contain.
"""

import importlib
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils.epath import PathLike

from jdm.errors import Failure, InvalidValue
from jdm.files import local_path
from jdm.messages import STDOUT, say
from jdm.names import WEIGHT_FILES

# Parts of a name that parallel, compiled and checkpointed modules of PyTorch add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class FileFormat(NamedTuple):
    """How a state_dict {name: array} is read from a file, and encoded as its content."""

    read: Callable[[PathLike], Any]  # of tensors, and whatever else the file has
    encode: Callable[[dict[str, np.ndarray]], bytes]


def file_format(parameter: str, path: PathLike) -> FileFormat:
    """The format of a file, by its ending. Raises InvalidValue for an ending not in FORMATS."""
    ending = Path(path).suffix
    if ending not in FORMATS:
        raise InvalidValue(parameter, str(path), f"must end in one of {', '.join(FORMATS)}")
    return FORMATS[ending]


def read(path: PathLike) -> dict[str, np.ndarray]:
    """{name: array} of a state_dict on disk, in its order.

    The state_dict may be an entry of the file's dict, {"state_dict": …}, and have names from
    wrapped modules, which are read without WRAPPERS. Floats of fewer than 32 bits become float32,
    which changes no value. What was done is said in one line.

    Raises InvalidValue for a file that is missing, damaged, contains code or has not exactly one
    state_dict; OSError where it cannot be opened; Failure without PyTorch.
    """
    path = local_path("from", path)
    read_file = file_format("from", path).read
    if not Path(path).is_file():
        raise InvalidValue("from", str(path), "is not a file")
    open(path, "rb").close()  # a file that cannot be opened is an OSError; it is not damaged
    try:
        content = read_file(path)
    except (InvalidValue, Failure, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        problem = f"has more than weights ({named[1]})" if named else "is damaged, or no state_dict"
        hint = "torch.save(model.state_dict(), …) writes what can be read" if named else ""
        allowed = f"{problem}, and code in a file is never run"
        raise InvalidValue("from", str(path), allowed, hint) from error
    # PyTorch has no error type for damage: a truncated file raises OSError, RuntimeError or
    # EOFError, depending on where it ends.
    except Exception as error:
        if "TorchScript" in str(error):
            problem = "is a TorchScript archive; the state_dict of its model can be read"
        else:
            problem = f"is damaged or not a state_dict: {str(error) or type(error).__name__}"
        raise InvalidValue("from", str(path), problem.split("\n")[0]) from error
    entry, state = _state_dict(path, content)
    names = {name: _unwrapped(name) for name in state}
    names = {name: plain for name, plain in names.items() if plain != "n_averaged"}
    if len(set(names.values())) < len(names):  # a wrapped and a plain model: whose are they?
        names = {name: name for name in names}
    arrays = {plain: _array(path, name, state[name]) for name, plain in names.items()}
    parts = {part for name, plain in names.items() if name != plain for part in name.split(".")}
    small = {str(state[name].dtype) for name in names if _is_small(state[name])}
    notes = [f"the entry {entry!r}"] * bool(entry)
    notes += [f"without {part!r} in the names" for part in sorted(parts & WRAPPERS)]
    notes += [f"{dtype.removeprefix('torch.')} as float32" for dtype in sorted(small)]
    if notes:
        say(f"read {path}: {', '.join(notes)}", STDOUT)
    return arrays


def _state_dict(path: PathLike, content: Any) -> tuple[str, dict[str, Any]]:
    """(entry, {name: tensor}) of a file; the entry is "" where the file is the state_dict."""
    torch = _import("torch")

    def refuse(allowed: str, hint: str = ""):
        raise InvalidValue("from", str(path), allowed, hint)

    def is_state(value: Any) -> bool:
        named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return named and all(isinstance(x, torch.Tensor) for x in value.values())

    if is_state(content) and content:
        return "", content
    inside = content if isinstance(content, dict) else {}
    found = [key for key, value in inside.items() if is_state(value) and value]
    if len(found) == 1:
        return str(found[0]), inside[found[0]]
    if found:
        hint = "a file of one of them can be read"
        refuse(f"has more than one state_dict: {', '.join(map(str, found))}", hint)
    others = [k for k, x in inside.items() if not isinstance(x, torch.Tensor)]
    if 0 < len(others) < len(inside):
        refuse(f"has entries beside its tensors, such as {others[0]!r}", "remove them")
    return refuse("has no state_dict, which is a dict of named tensors")


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_small(tensor: Any) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _array(path: PathLike, name: str, tensor: Any) -> np.ndarray:
    """A tensor as an array; NumPy has neither bfloat16 nor the floats of 8 bits."""
    try:
        return (tensor.float() if _is_small(tensor) else tensor).detach().numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
        allowed = f"has {name} as a tensor that cannot be read ({kind})"
        raise InvalidValue("from", str(path), allowed, "dense tensors of numbers can") from error


def _import(name: str) -> Any:
    """A module of the extra "torch". Raises Failure where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise Failure(f"conversion needs {package}: pip install 'jdm[torch]'") from error


def _read_torch(path: PathLike) -> Any:
    with warnings.catch_warnings():  # warnings about pickle protocols, which torch.load handles
        warnings.simplefilter("ignore")
        return _import("torch").load(path, map_location="cpu", weights_only=True)


def _encode_torch(arrays: dict[str, np.ndarray]) -> bytes:
    torch, buffer = _import("torch"), io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
    return buffer.getvalue()


_TORCH = FileFormat(_read_torch, _encode_torch)
_SAFETENSORS = FileFormat(
    lambda path: _import("safetensors.torch").load_file(path),  # reads more dtypes than NumPy has
    lambda arrays: _import("safetensors.numpy").save(arrays),
)
FORMATS = WEIGHT_FILES.records(
    {name: _SAFETENSORS if name == ".safetensors" else _TORCH for name in WEIGHT_FILES}
)
