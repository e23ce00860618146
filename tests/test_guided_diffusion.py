"""The options of guided-diffusion's released networks, against the same network in PyTorch.

That network is benchmarks/torch_network.py, with the names of the released state_dict and random
weights. The options: attention heads of a fixed number of channels, the time added before the
second normalisation of a block or as its scale and shift, and changes of the resolution by
convolutions or inside residual blocks. No classifier, no label.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm import convert
from jdm.config import config_from_dict, load_config
from jdm.errors import InvalidValue

torch = pytest.importorskip("torch", reason="PyTorch (the extra torch) runs the network")

SIDE = 32
COMMON = (f"model.image_size={SIDE}", "model.channels=32", "model.attention=(16,)")
RUNS = {
    "add, rgb": (
        "model.image_channels=3",
        "model.head_channels=16",
        "model.time_conditioning=add",
        "model.learned_variance=True",
        "diffusion.variance=learned",
    ),
    "scale_shift, grey, updown": (
        "model.head_channels=8",
        "model.attention_order=qkv_first",
        "model.resample=resblock",
    ),
}


@pytest.fixture(scope="module")
def network_of():
    """The class Network of benchmarks/torch_network.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        return importlib.import_module("torch_network").Network


@pytest.fixture(scope="module", params=RUNS)
def converted(request, network_of, tmp_path_factory):
    """(network in PyTorch, its file, our config, the work folder of the file)."""
    torch.manual_seed(0)
    settings, folder = (*COMMON, *RUNS[request.param]), tmp_path_factory.mktemp("released")
    config = load_config("tiny", [f"--config.{setting}" for setting in settings])
    network = network_of(config.model, head=False).eval()
    with torch.no_grad():
        for array in network.parameters():
            array.add_(0.05 * torch.randn_like(array))
    torch.save(network.state_dict(), folder / "released.pt")
    convert.from_file(folder / "released.pt", config, folder / "run", without_head=True)
    return network, folder / "released.pt", config, folder / "run"


def test_the_output_is_that_of_the_network_in_pytorch(converted):
    network, _, config, workdir = converted
    joint, rng = jdm.load(workdir), np.random.default_rng(0)
    x = rng.normal(size=(2, SIDE, SIDE, config.model.image_channels)).astype(np.float32)
    t = np.array([3, 40], np.int32)

    @jax.jit
    def raw_of(weights, x, t):
        features = joint.model.apply(weights, x, t, method="encode")
        return joint.model.apply(weights, features, t, method="decode")

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(raw_of(joint.weights, jnp.asarray(x), jnp.asarray(t)))
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t))
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_file_comes_back_to_the_byte(converted, tmp_path):
    network, path, config, workdir = converted
    convert.to_file(workdir, tmp_path / "back.pt", without_head=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(back) == set(network.state_dict())
    for name, array in network.state_dict().items():
        assert back[name].numpy().tobytes() == array.numpy().tobytes(), name
    stored = jdm.load(workdir).config.model
    assert stored.head_channels == config.model.head_channels > 0
    assert stored.time_conditioning == config.model.time_conditioning


def test_another_conditioning_does_not_fit(converted):
    _, path, config, _ = converted
    other = {"add": "scale_shift", "scale_shift": "add"}[config.model.time_conditioning]
    config = config.copy_and_resolve_references()
    config.model.time_conditioning = other
    with pytest.raises(InvalidValue, match="does not fit the config: .*emb_layers.1.bias"):
        convert.load_weights(path, config, without_head=True)


def test_the_released_network_of_256_pixels_has_its_names_and_size():
    """Shapes only. A level has two blocks in the encoder, three in the decoder."""
    settings = (
        "model.image_size=256",
        "model.image_channels=3",
        "model.channels=256",
        "model.multipliers=(1,1,2,2,4,4)",
        "model.blocks=2",
        "model.attention=(32,16,8)",
        "model.head_channels=64",
        "model.resample=resblock",
        "model.learned_variance=True",
        "diffusion.variance=learned",
    )
    config = load_config("tiny", [f"--config.{setting}" for setting in settings])
    names = convert.entries(convert.make_model(config.model, config.exec), head=False)
    assert "output_blocks.17.0.out_layers.3.weight" in names
    assert not any(name.startswith("output_blocks.18.") for name in names)
    assert names["out.2.weight"].array.shape == (6, 256, 3, 3)
    assert sum(entry.array.size for entry in names.values()) == 552_814_086


def test_a_config_from_before_these_keys_keeps_its_network():
    values = load_config("tiny").to_dict()
    for key in ("head_channels", "time_conditioning"):
        del values["model"][key]
    assert config_from_dict(values) == load_config("tiny")
