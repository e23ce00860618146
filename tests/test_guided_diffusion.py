"""The options of guided-diffusion's released networks, against the same network in PyTorch.

The layers here are written from the description of the network in Dhariwal & Nichol 2021, with the
names of their state_dict and random weights: attention heads of a fixed number of channels, the
time added before the second normalisation of a block or as its scale and shift, and changes of the
resolution by convolutions or inside residual blocks. No classifier, no label.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm import convert
from jdm.config import config_from_dict, load_config
from jdm.errors import InvalidValue

torch = pytest.importorskip("torch", reason="PyTorch (the extra torch) runs the network")
nn, functional = torch.nn, torch.nn.functional


class Residual(nn.Module):
    def __init__(self, before, after, embedding, add, resize=None):
        super().__init__()
        silu, self.add, self.resize = nn.SiLU(), add, resize or nn.Identity()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, before), silu, nn.Conv2d(before, after, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(silu, nn.Linear(embedding, after if add else 2 * after))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, after), silu, nn.Dropout(0.0), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x, embedding):
        norm, silu, conv = self.in_layers
        h = conv(self.resize(silu(norm(x))))
        numbers, (norm, *rest) = self.emb_layers(embedding)[:, :, None, None], self.out_layers
        if self.add:
            h = norm(h + numbers)
        else:
            scale, shift = numbers.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        return self.skip_connection(self.resize(x)) + nn.Sequential(*rest)(h)


class Attention(nn.Module):
    def __init__(self, channels, head_channels, new_order):
        super().__init__()
        self.heads, self.new_order = channels // head_channels, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding):
        b, c, height, width = x.shape
        h = self.qkv(self.norm(x.reshape(b, c, -1)))
        if self.new_order:
            q, k, v = h.reshape(b, 3, self.heads, c // self.heads, -1).unbind(1)
        else:
            q, k, v = h.reshape(b, self.heads, 3, c // self.heads, -1).unbind(2)
        weights = torch.einsum("bhdq,bhdk->bhqk", q, k) / math.sqrt(c // self.heads)
        h = torch.einsum("bhqk,bhdk->bhdq", weights.softmax(-1), v)
        return x + self.proj_out(h.reshape(b, c, -1)).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class Network(nn.Module):
    """Two levels of one block; attention on the second."""

    def __init__(self, images, out, width, head_channels, add, new_order, updown):
        super().__init__()
        self.width, e, w = width, 4 * width, (width, 2 * width)

        def residual(before, after, resize=None):
            return Residual(before, after, e, add, resize)

        def attention():
            return Attention(w[1], head_channels, new_order)

        down = residual(w[0], w[0], nn.AvgPool2d(2)) if updown else Down(w[0])
        up = residual(w[1], w[1], nn.Upsample(scale_factor=2)) if updown else Up(w[1])
        self.time_embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        inputs = [
            [nn.Conv2d(images, w[0], 3, padding=1)],
            [residual(w[0], w[0])],
            [down],
            [residual(w[0], w[1]), attention()],
        ]
        outputs = [
            [residual(w[1] + w[1], w[1]), attention()],
            [residual(w[1] + w[0], w[1]), attention(), up],
            [residual(w[1] + w[0], w[0])],
            [residual(w[0] + w[0], w[0])],
        ]
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, inputs))
        middle = [residual(w[1], w[1]), attention(), residual(w[1], w[1])]
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, outputs))
        last = nn.Conv2d(w[0], out, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, w[0]), nn.SiLU(), last)

    def forward(self, x, t):
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        (stem,), *inputs = self.input_blocks
        h, skips = stem(x), []
        for block in inputs:
            skips.append(h)
            for layer in block:
                h = layer(h, embedding)
        skips.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, embedding)
        return self.out(h)


RUNS = {
    "add, rgb": dict(images=3, out=6, head_channels=16, add=True, new_order=False, updown=False),
    "scale_shift, grey, updown": dict(
        images=1, out=1, head_channels=8, add=False, new_order=True, updown=True
    ),
}
SIDE = 32


def config_of(images, out, head_channels, add, new_order, updown):
    learned = out > images
    return load_config(
        "tiny",
        [
            f"--config.{setting}"
            for setting in (
                f"model.image_size={SIDE}",
                f"model.image_channels={images}",
                "model.channels=32",
                "model.attention=(16,)",
                f"model.head_channels={head_channels}",
                f"model.time_conditioning={'add' if add else 'scale_shift'}",
                f"model.attention_order={'qkv_first' if new_order else 'head_first'}",
                f"model.resample={'resblock' if updown else 'conv'}",
                f"model.learned_variance={learned}",
                f"diffusion.variance={'learned' if learned else 'fixed_large'}",
            )
        ],
    )


@pytest.fixture(scope="module", params=RUNS)
def converted(request, tmp_path_factory):
    """(network in PyTorch, its file, our config, the work folder of the file)."""
    torch.manual_seed(0)
    fields, folder = RUNS[request.param], tmp_path_factory.mktemp("released")
    network = Network(width=32, **fields).eval()
    with torch.no_grad():
        for array in network.parameters():
            array.add_(0.05 * torch.randn_like(array))
    torch.save(network.state_dict(), folder / "released.pt")
    config = config_of(**fields)
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
