"""Every implementation of attention computes the same outputs and gradients."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.config import load_config
from jdm.errors import InvalidValue
from jdm.nn import attention
from jdm.nn.attention import ATTENTIONS
from jdm.nn.model import check_shape, make_model


def inputs(positions, dtype="float32", batch=2, heads=2, width=4):
    rng = np.random.default_rng(0)
    shape = (3, batch, positions, heads, width)
    return jnp.asarray(2 * rng.normal(size=shape), dtype)


def by_hand(q, k, v):
    """softmax(q kᵀ / sqrt(d)) v in float64, one image and head after the other."""
    out = np.empty(q.shape)
    for image in range(q.shape[0]):
        for head in range(q.shape[2]):
            q1, k1, v1 = (np.asarray(x, np.float64)[image, :, head] for x in (q, k, v))
            scores = q1 @ k1.T / np.sqrt(q1.shape[-1])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[image, :, head] = weights @ v1 / weights.sum(axis=1, keepdims=True)
    return out


HERE = [name for name, one in ATTENTIONS.items() if not one.why_not("float32", 4)]


@pytest.fixture(params=HERE)
def attend(request, monkeypatch):
    monkeypatch.setattr(attention, "MOST_QUERIES", 6)  # so that few positions need several parts
    monkeypatch.setattr(attention, "LARGE", 8)
    return ATTENTIONS[request.param].attend


@pytest.mark.parametrize("positions", [1, 4, 16, 18])
def test_outputs_are_those_of_the_definition(attend, positions):
    q, k, v = inputs(positions)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), by_hand(q, k, v), atol=1e-5)


def test_large_scores_do_not_overflow(attend):
    q, k, v = inputs(16)
    np.testing.assert_allclose(attend(9 * q, 9 * k, v), by_hand(9 * q, 9 * k, v), atol=1e-3)


def test_gradients_are_those_of_the_plain_implementation(attend):
    x = inputs(18)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x[0].shape), jnp.float32)

    def gradient(attend):
        return jax.jit(jax.grad(lambda x: (weights * attend(*x) ** 2).sum()))(x)

    expected = gradient(attention.xla)
    np.testing.assert_allclose(gradient(attend), expected, atol=1e-4 * np.abs(expected).max())


def test_derivatives_of_derivatives_and_of_batches_are_those_of_the_plain_one(attend):
    q, k, v = inputs(18)

    def second(attend):
        def first(q, k, v):
            return jax.grad(lambda k: (attend(q, k, v) ** 2).sum())(k)

        along_q = jax.grad(lambda q: (first(q, k, v) ** 2).sum())(q)
        return along_q, jax.vmap(first)(q[:, None], k[:, None], v[:, None])

    for ours, theirs in zip(second(attend), second(attention.xla), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


def test_half_precision_is_near(attend):
    x = inputs(18)
    found = attend(*x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), by_hand(*x), atol=0.1)


def test_no_score_matrix_is_kept_for_the_gradient():
    """What the derivative keeps is linear in the number of positions."""
    kept = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(attention._forward, *x)[1]))
        for x in (inputs(256), inputs(512))
    ]
    assert kept[1] == 2 * kept[0]


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jdm.mesh import make_mesh, to_global
from jdm.nn.attention import chunked

with np.load(sys.argv[1]) as saved:
    parts = to_global(dict(saved), make_mesh())
assert all(len(x.addressable_shards) == 8 for x in parts.values())
np.savez(sys.argv[2], out=jax.jit(chunked)(*(parts[name] for name in "qkv")))
"""


def test_a_batch_on_eight_devices_is_attended_to_as_on_one(tmp_path):
    x = dict(zip("qkv", inputs(18, batch=16), strict=True))
    np.savez(tmp_path / "in.npz", **x)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, tmp_path / "in.npz", tmp_path / "out.npz"],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        timeout=120,
    )
    with np.load(tmp_path / "out.npz") as saved:
        np.testing.assert_allclose(saved["out"], by_hand(*x.values()), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("cpu", ["exec.dtype=bfloat16"], "needs an NVIDIA GPU, and JAX runs on cpu"),
        ("NVIDIA H100", [], "needs config.exec.dtype='bfloat16', not 'float32'"),
        ("NVIDIA H100", ["exec.dtype=bfloat16"], "channels, and the model has heads of 4"),
        ("NVIDIA H100", ["exec.dtype=bfloat16", "model.heads=1", "model.channels=80"], "of 160"),
        ("NVIDIA H100", ["exec.dtype=bfloat16", "model.head_channels=8"], None),
        ("NVIDIA H100", ["exec.dtype=bfloat16", "model.heads=1"], None),
    ],
)
def test_fused_attention_says_what_it_needs(kind, settings, why, monkeypatch):
    """The network is tiny, with 16 channels at its one level with attention."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    settings = ["model.heads=4", *settings, "exec.attention=fused"]
    config = load_config("tiny", [f"--config.{setting}" for setting in settings])
    model = make_model(config.model, config.exec)
    if why is None:
        return check_shape(model)
    with pytest.raises(InvalidValue, match=f"config.exec.attention='fused' .*{why}"):
        check_shape(model)
