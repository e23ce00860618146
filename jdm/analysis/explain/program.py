"""The compiled program of a counterfactual: an image, noised to a level and denoised to a target.

With the noise eps of an image, its noised version at every level t is known,

(16)  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

Denoising starts from (16) at the first timestep, under guidance toward the target. With a mask M,
each step changes some pixels alone, and the others follow (16), so that they end as they were
(Lugmayr et al. 2022, RePaint, eq. 8):

(17)  x_s = M x_s + (1 - M) (sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps)

M is computed again at every step: the pixels in which the gradient of log p(target | x_t) is
largest (MaskDiME, arXiv:2602.18792), within a region, where one is given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Num, UInt8

from jdm import names
from jdm.diffusion.guidance import gradients, guide
from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, float_to_pixels, pixels_to_float, to_floats
from jdm.diffusion.samplers import ddim_inverse, image_noise, reverse, timesteps
from jdm.errors import InvalidValue
from jdm.joint import Joint, abstract_weights, image_shape, logits_of, make_network
from jdm.mesh import by_row, in_batches, on_devices, replicated, whole
from jdm.nn.model import JointModel
from jdm.numerics import key_of
from jdm.sampling.programs import fitting

COPIES = 4  # noises over which the probabilities of a noised image are averaged
# Between the seeds of several noises of one image: the golden ratio of 2**32, which is odd, so that
# neighbouring seeds have no noise in common.
STRIDE = 0x9E3779B9
INVERSE_ITERATIONS = 3  # of each step of the inversion, see samplers.ddim_inverse


def largest(values: Float[Array, "b h w"], share: Float[Array, " b"]) -> Bool[Array, "b h w 1"]:
    """Where the largest values of each image are: this share of its pixels, at least one."""
    flat = values.reshape(len(values), -1)
    count = jnp.clip(jnp.round(share * flat.shape[1]), 1, flat.shape[1]).astype(jnp.int32)
    least = jnp.take_along_axis(jnp.sort(flat, axis=1)[:, ::-1], count[:, None] - 1, axis=1)
    return (values >= least[:, :, None])[..., None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _denoised(model, diffusion, method, start, masked, weights, inputs, scale, times):
    """uint8 [B, H, W, C]: images, noised to the level times[0] and denoised to the targets.

    masked: whether (17) is applied. inputs: (images, seeds, targets, share of pixels [B], region
    bool [B, H, W, 1]). scale: of the guidance; 0 is none. times: decreasing timesteps, traced.
    """
    x0, seeds, targets, share, region = inputs
    network, keys = make_network(model, diffusion, weights), key_of(seeds)
    eps_fn = guide(network, diffusion, method, targets, scale)
    eps = STARTS[start](network, diffusion, keys, x0, times)

    def replace(x, t, x_s, at_s):
        g, _, _ = gradients(network, x, t, targets)
        size = jnp.where(region[..., 0], jnp.sqrt((g**2).sum(axis=-1)), -1.0)
        kept = jnp.sqrt(at_s.abar) * x0 + jnp.sqrt(at_s.variance) * eps
        return jnp.where(largest(size, share) & region, x_s, kept)

    xt = diffusion.q_sample(x0, jnp.full(len(x0), times[0]), eps)
    x, _ = reverse(eps_fn, diffusion, xt, keys, times, method, replace=replace if masked else None)
    return float_to_pixels(x)


def _drawn(network, diffusion, keys, x0, times):
    return image_noise(keys, diffusion.steps, x0.shape[1:])


def _inverted(network, diffusion, keys, x0, times):
    def eps_fn(x, t):
        return network.decode(network.encode(x, t), x, t)

    x = ddim_inverse(eps_fn, diffusion, x0, times, INVERSE_ITERATIONS)
    return diffusion.eps_from_x0(x, jnp.full(len(x), times[0]), x0)


# The noise eps of images: (network, diffusion, keys, x0, times) -> [B, H, W, C]. Drawn from the
# seed, or the one with which (16) at times[0] is what ddim inverts the image to.
STARTS: dict[str, Callable] = names.EXPLAIN_STARTS.records(noise=_drawn, inversion=_inverted)


@functools.cache
def _compiled(
    model: JointModel,
    diffusion: Diffusion,
    method: Method,
    start: str,
    masked: bool,
    steps: int,
    mesh: Mesh,
    rows: int,
) -> jax.stages.Compiled:
    """`_denoised` for a batch of `rows` images, split over the mesh."""
    outcomes = model.num_classes * (2 if model.multi_label else 1)
    height, width, channels = image_shape(model)
    by, every = by_row(mesh), replicated(mesh)
    shapes = (
        ((height, width, channels), jnp.float32),
        ((), jnp.uint32),
        ((outcomes,), jnp.float32),
        ((), jnp.float32),
        ((height, width, 1), jnp.bool_),
    )
    inputs = tuple(jax.ShapeDtypeStruct((rows, *s), d, sharding=by) for s, d in shapes)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=every)
    times = jax.ShapeDtypeStruct((steps,), jnp.int32, sharding=every)
    static = (model, diffusion, method, start, masked)
    return _denoised.lower(*static, abstract_weights(model, mesh), inputs, scale, times).compile()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noised_probabilities(model, diffusion, weights, images, seeds, t):
    x0, t = pixels_to_float(images), jnp.full(len(images), t)

    def of_copy(copy):
        noise = image_noise(key_of(seeds + copy), diffusion.steps, x0.shape[1:])
        return logits_of(model, weights, diffusion.q_sample(x0, t, noise), t)

    logits = jax.lax.map(of_copy, jnp.arange(COPIES, dtype=jnp.uint32) * jnp.uint32(STRIDE))
    activation = jax.nn.sigmoid if model.multi_label else jax.nn.softmax
    return activation(logits).mean(axis=0)


def noised_probabilities(
    joint: Joint,
    images: UInt8[np.ndarray, "n h w c"],
    seeds: Num[np.ndarray, " n"],
    t: int,
    batch_size: int,
) -> Float[np.ndarray, "n k"]:
    """Class probabilities of images at noise level t, the means over 4 noises, float32 [N, K]."""

    def of_batch(weights: Any, batch: Any, seeds: Any) -> Any:
        static = (joint.model, joint.diffusion)
        return _noised_probabilities(*static, weights, batch, seeds, jnp.int32(t))

    return in_batches(of_batch, joint.weights, [images, seeds.astype(np.uint32)], batch_size)


def times_from(diffusion: Diffusion, method: Method, strength: float) -> np.ndarray:
    """The timesteps of a method, int32, from a noise level down that is this share of T.

    Raises InvalidValue where the method has more of them than there are noise levels.
    """
    total = max(1, round(strength * diffusion.steps))
    try:
        return timesteps(diffusion, method.steps, method.spacing, total)
    except InvalidValue as error:
        hint = f"{strength} of T={diffusion.steps} are {total} noise levels"
        raise InvalidValue(error.parameter, error.value, error.allowed, hint) from None


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Images that are noised and denoised, in batches of one compiled shape.

    n: the most images of a call; a call of fewer has the same batches. start: one of STARTS.
    masked: whether a mask is applied. region: bool [1, H, W, 1], the pixels that it may hold.
    """

    joint: Joint
    method: Method
    n: int
    start: str = "noise"
    masked: bool = False
    region: Bool[np.ndarray, "1 h w 1"] | None = None
    batch_size: int | None = None

    def __call__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        seeds: Num[np.ndarray, " n"],
        targets: Float[np.ndarray, "n m"],
        strength: float,
        scale: float = 0.0,
        shares: Float[np.ndarray, " n"] | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """strength: the noise level to start from, as a share of T. scale: of the guidance toward
        the targets; 0 is none. shares: of the pixels that the mask holds; None is 1."""
        joint, mesh, count = self.joint, self.joint.mesh, len(images)
        times = times_from(joint.diffusion, self.method, strength)
        static = (joint.model, joint.diffusion, self.method, self.start, self.masked, len(times))
        compiled = functools.partial(_compiled, *static, mesh)
        rows, program = fitting(self.n, mesh, self.batch_size, compiled)
        region = (
            np.ones((1, *joint.image_shape[:2], 1), bool) if self.region is None else self.region
        )
        inputs = (
            np.asarray(to_floats(images)),
            seeds.astype(np.uint32),
            targets,
            (np.ones(count) if shares is None else shares).astype(np.float32),
            np.broadcast_to(region, (count, *region.shape[1:])),
        )
        once = (whole(joint.weights), np.float32(scale), times)
        weights, scale, times = jax.device_put(once, replicated(mesh))
        found = [np.zeros((0, *joint.image_shape), np.uint8)]
        for first in range(0, count, rows):
            part = tuple(x[first : first + rows] for x in inputs)
            result = program(weights, on_devices(part, rows, mesh), scale, times)
            found.append(np.asarray(result)[: len(part[0])])
        return np.concatenate(found)
