"""jdm.torch_files: the dtypes, wrappers and endings that files of a state_dict come with."""

import numpy as np
import pytest

from jdm.errors import InvalidValue
from jdm.torch_files import FORMATS, read

torch = pytest.importorskip("torch", reason="PyTorch (the extra torch) reads and writes the files")

FLOATS = {"out.weight": torch.linspace(-3, 3, 6).reshape(2, 3), "out.bias": torch.ones(2) / 3}
STATE = {**FLOATS, "bn.num_batches_tracked": torch.tensor(7)}
SMALL = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def saved(path, content):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


def assert_read(path, expected, capsys, note):
    """That the arrays of a file are these tensors, and that `note` is what is said of it."""
    found = read(path)
    assert capsys.readouterr().out == (f"read {path}: {note}\n" if note else "")
    assert list(found) == list(expected) or path.suffix == ".safetensors"
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.numpy().dtype, name
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("ending", FORMATS)
def test_small_floats_are_read_as_float32(tmp_path, dtype, ending, capsys):
    small = {name: x.to(dtype) if x.is_floating_point() else x for name, x in STATE.items()}
    widened = {name: x.float() if x.is_floating_point() else x for name, x in small.items()}
    path = saved(tmp_path / f"model{ending}", small)
    assert_read(path, widened, capsys, f"{str(dtype).removeprefix('torch.')} as float32")


def renamed(prefix):
    return {prefix + name: x for name, x in STATE.items()}


WRAPPED = {
    "none": (STATE, ""),
    "parallel": (renamed("module."), "without 'module' in the names"),
    "compiled": (renamed("_orig_mod."), "without '_orig_mod' in the names"),
    "both": (
        renamed("module._orig_mod."),
        "without '_orig_mod' in the names, without 'module' in the names",
    ),
    "block": (
        {name.replace(".", "._checkpoint_wrapped_module."): x for name, x in STATE.items()},
        "without '_checkpoint_wrapped_module' in the names",
    ),
    "averaged": (
        {"n_averaged": torch.tensor(3), **renamed("module.")},
        "without 'module' in the names",
    ),
    "entry": ({"state_dict": STATE, "epoch": 3}, "the entry 'state_dict'"),
    "any entry": ({"net": STATE, "optimizer": {"state": {0: FLOATS}}}, "the entry 'net'"),
    "entry of parallel": (
        {"model": renamed("module.")},
        "the entry 'model', without 'module' in the names",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_around_a_state_dict_is_said_and_removed(tmp_path, name, capsys):
    content, note = WRAPPED[name]
    assert_read(saved(tmp_path / "model.ckpt", content), STATE, capsys, note)


def test_a_model_beside_its_wrapped_copy_keeps_all_names(tmp_path, capsys):
    both = STATE | renamed("module.")
    assert_read(saved(tmp_path / "model.pt", both), both, capsys, "")


REFUSED = {
    "two": ({"model": STATE, "ema": STATE}, "has more than one state_dict: model, ema; a file of"),
    "beside": ({**STATE, "step": 3}, "has entries beside its tensors, such as 'step'; remove them"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "has a as a tensor that cannot be read (float32, "),
    "meta": ({"a": torch.ones(3, device="meta")}, "cannot be read (float32, strided, on meta)"),
    "empty": ({}, "has no state_dict"),
    "whole model": (torch.nn.Linear(2, 2), "has more than weights (torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, name):
    content, said = REFUSED[name]
    path = saved(tmp_path / "model.pt", content)
    with pytest.raises(InvalidValue) as error:
        read(path)
    assert said in str(error.value) and "damaged" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(InvalidValue, match="is a TorchScript archive; the state_dict of"):
        read(tmp_path / "model.pt")
