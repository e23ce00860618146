"""Every implementation of attention computes the same outputs and gradients.

The kernel for TPUs is interpreted here, and lowered for TPUs that are not here.
"""

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
from jdm.nn import attention, attention_tpu
from jdm.nn.attention import ATTENTIONS
from jdm.nn.model import check_shape, make_model
from jdm.target import compiling_for


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


HERE = {
    name: one.attend
    for name, one in ATTENTIONS.items()
    if not one.why_not("float32", positions=16, heads=2, width=4)
} | {"tpu": attention_tpu.attend}


def of_heads(attend, order="qkv_first"):
    """An implementation as a function of q, k and v."""

    def of_each(q, k, v):
        each = jnp.stack([q, k, v], axis=2 if order == "qkv_first" else 3)
        return attend(each.reshape(*q.shape[:2], -1), q.shape[2], order).reshape(q.shape)

    return of_each


@pytest.fixture(params=HERE)
def attend(request, monkeypatch):
    monkeypatch.setattr(attention, "MOST_QUERIES", 6)  # so that few positions need several parts
    monkeypatch.setattr(attention, "LARGE", 8)
    return of_heads(HERE[request.param])


@pytest.mark.parametrize("positions", [1, 4, 16, 18])
def test_outputs_are_those_of_the_definition(attend, positions):
    q, k, v = inputs(positions)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), by_hand(q, k, v), atol=1e-5)


@pytest.mark.parametrize("order", attention.ATTENTION_ORDERS)
@pytest.mark.parametrize("name", HERE)
def test_the_order_of_channels_is_that_of_the_model(name, order):
    q, k, v = inputs(4, heads=3)
    found = of_heads(HERE[name], order)(q, k, v)
    np.testing.assert_allclose(found, by_hand(q, k, v), atol=1e-5)


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
from jdm.nn import attention_tpu
from jdm.nn.attention import ATTENTIONS
from jdm.target import compiling_for

with np.load(sys.argv[1]) as saved:
    qkv = to_global(dict(saved), make_mesh())["qkv"]
assert len(qkv.addressable_shards) == 8
each = dict(chunked=ATTENTIONS["chunked"].attend, tpu=attention_tpu.attend)
found = {name: jax.jit(attend, static_argnums=(1, 2)) for name, attend in each.items()}
odd = {f"odd_{name}": attend(qkv[:3], 2, "qkv_first") for name, attend in found.items()}
found = {name: attend(qkv, 2, "qkv_first") for name, attend in found.items()}
assert len(found["tpu"].addressable_shards[0].data) == 2  # each device computes its rows
np.savez(sys.argv[2], **found, **odd)
with compiling_for("tpu"):  # XLA refuses a kernel in a program of several devices that is not split
    for rows in (16, 3):
        x = qkv[:rows]
        whole = jax.jit(jax.grad(lambda x: attention_tpu.attend(x, 2, "qkv_first").sum())).trace(x)
        assert "tpu_custom_call" in whole.lower(lowering_platforms=("tpu",)).as_text()
"""


def test_a_batch_on_eight_devices_is_attended_to_as_on_one(tmp_path):
    x = inputs(18, batch=16)
    np.savez(tmp_path / "in.npz", qkv=jnp.moveaxis(x, 0, 2).reshape(16, 18, -1))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, tmp_path / "in.npz", tmp_path / "out.npz"],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        timeout=120,
    )
    with np.load(tmp_path / "out.npz") as saved:
        for name, found in saved.items():
            expected = by_hand(*x)[: len(found)]
            np.testing.assert_allclose(
                found.reshape(expected.shape), expected, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize(
    ("positions", "dtype", "kernel"),
    [
        (16, "float32", False),
        (64, "float32", True),
        (784, "bfloat16", True),
        (1600, "bfloat16", False),
    ],
)
def test_on_tpus_auto_is_the_kernel_where_it_fits_and_positions_are_not_few(
    positions, dtype, kernel
):
    qkv = jax.ShapeDtypeStruct((1, positions, 3 * 64), dtype)
    with compiling_for("tpu"):
        traced = jax.make_jaxpr(lambda x: ATTENTIONS["auto"].attend(x, 4, "head_first"))(qkv)
    assert ("pallas_call" in str(traced)) == kernel
    assert not traced.consts


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("cpu", ["exec.dtype=bfloat16"], "needs an NVIDIA GPU or a TPU, and JAX runs on cpu"),
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


def test_a_network_whose_attention_is_too_large_for_a_tpu_is_refused():
    settings = ["model.image_size=40", "model.attention=(40,)", "exec.attention=fused"]
    config = load_config("tiny", [f"--config.{setting}" for setting in settings])
    size = "1600 positions of 8 channels"
    with (
        compiling_for("tpu"),
        pytest.raises(InvalidValue, match=f"exec.attention='fused' needs .* MiB for {size}, and"),
    ):
        check_shape(make_model(config.model, config.exec))
