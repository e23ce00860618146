"""Our 3×3 convolution and its derivatives are those of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.nn import convolution


def inputs(shape, dtype=jnp.float32):
    b, height, width, c, d = shape
    rng = np.random.default_rng(0)
    shapes = (b, height, width, c), (3, 3, c, d), (b, height, width, d)
    return [jax.device_put(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def derivatives(conv, x, kernel, gradient):
    return jax.jit(lambda x, kernel, g: jax.vjp(conv, x, kernel)[1](g))(x, kernel, gradient)


SHAPES = [(4, 5, 7, 3, 4), (1, 1, 1, 2, 3), (3, 4, 4, 8, 8), (2, 2, 6, 1, 2)]


@pytest.mark.parametrize("large", [1, convolution.LARGE])  # XLA's convolution, or products
@pytest.mark.parametrize("cached", [1, 300, convolution.CACHED])  # parts of one image, of 2, of all
@pytest.mark.parametrize("shape", SHAPES)
def test_it_and_its_derivatives_are_those_of_xla(shape, cached, large, monkeypatch):
    monkeypatch.setattr(convolution, "CACHED", cached)
    monkeypatch.setattr(convolution, "LARGE", large)
    for traced in (convolution._forward, convolution._backward):  # once for a shape
        traced.clear_cache()
    given = inputs(shape)
    close = dict(rtol=1e-4, atol=1e-4)
    ours, theirs = convolution.conv3x3(*given[:2]), convolution.xla(*given[:2])
    np.testing.assert_allclose(ours, theirs, **close)
    for ours, theirs in zip(
        derivatives(convolution.conv3x3, *given), derivatives(convolution.xla, *given), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, **close)


def test_derivatives_of_derivatives_and_of_batches_are_those_of_xla():
    x, kernel, _ = inputs((2, 4, 4, 3, 3))

    def second(conv):
        def first(x, kernel):
            return jax.grad(lambda k: (conv(x, k) ** 3).sum())(kernel)

        along_x = jax.grad(lambda x: (first(x, kernel) ** 2).mean())(x)
        return along_x, jax.vmap(first, in_axes=(0, None))(x[:, None], kernel)

    for ours, theirs in zip(second(convolution.conv3x3), second(convolution.xla), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def test_half_precision_is_near():
    given = inputs((2, 6, 6, 4, 4), jnp.bfloat16)
    for ours, theirs in zip(
        derivatives(convolution.conv3x3, *given),
        derivatives(convolution.xla, *(x.astype(jnp.float32) for x in given)),
        strict=True,
    ):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(ours.astype(np.float32) - theirs).max() / np.abs(theirs).max()
        assert error < 0.02


def test_it_is_used_for_the_shapes_that_it_is_faster_for():
    def uses_it(channels, stride):
        x, kernel, _ = inputs((2, 6, 6, channels, 32))
        traced = jax.make_jaxpr(lambda x, kernel: convolution.conv(x, kernel, stride))(x, kernel)
        return "custom_vjp" in str(traced)

    assert uses_it(32, 1) and not uses_it(32, 2) and not uses_it(8, 1)


def test_other_strides_and_sizes_are_left_to_xla():
    x, kernel, _ = inputs((2, 6, 6, 32, 32))
    for stride, size in ((2, 3), (1, 1)):
        center = kernel[:size, :size]
        np.testing.assert_array_equal(
            convolution.conv(x, center, stride), convolution.xla(x, center, stride)
        )
    assert convolution.conv(x, kernel, 2).shape == (2, 3, 3, 32)
