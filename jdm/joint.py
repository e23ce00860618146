"""Joint: a trained joint model with its weights; what one holds in a notebook.

Owns loading, and the two questions everything else asks of a trained network: its estimate of the
noise, and its logits. Does not train, sample or plot.
"""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from jdm import checkpoint
from jdm import config as configs
from jdm.diffusion.guidance import Network, answers
from jdm.diffusion.process import Diffusion, pixels_to_float
from jdm.mesh import local_mesh, replicated
from jdm.nn.model import JointModel, check_shape
from jdm.pretrained import PRETRAINED


def make_network(model: JointModel, diffusion: Diffusion, weights: Any) -> Network:
    """The three functions that guidance and samplers see of a model with its weights."""

    def apply(method, *args):
        return model.apply(weights, *args, method=method)

    return Network(
        encode=functools.partial(apply, "encode"),
        decode=lambda features, x, t: diffusion.estimate(apply("decode", features, t), x, t),
        log_probabilities=lambda features, t: answers(
            apply("classify", features, t), model.multi_label
        ),
    )


def judged_by(network: Network, judge: Network) -> Network:
    """The network with the classifier of another one, which reads x_t by an encoder of its own."""
    return Network(
        encode=lambda x, t: (network.encode(x, t), judge.encode(x, t)),
        decode=lambda features, x, t: network.decode(features[0], x, t),
        log_probabilities=lambda features, t: judge.log_probabilities(features[1], t),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _denoise(model, diffusion, weights, xt, t):
    network = make_network(model, diffusion, weights)
    return network.decode(network.encode(xt, t), xt, t).eps


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, weights, x, t):
    return model.apply(weights, model.apply(weights, x, t, method="encode"), t, method="classify")


def answers_of(model: JointModel, weights: Any, x: Float[Array, "b h w c"], t: Int[Array, " b"]):
    """Log-probabilities [B, M] of the model's answers, see guidance.answers."""
    return answers(_logits(model, weights, x, t), model.multi_label)


def digest(arrays: Iterable[Any]) -> str:
    """A short name of what arrays hold."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Joint:
    """A joint model, its diffusion and its weights.

    config: the resolved config it was trained with. weights: {"params", "batch_stats"}, the moving
    average of the parameters and of the head's running statistics ({} where it keeps none).
    """

    config: ConfigDict
    model: JointModel
    diffusion: Diffusion
    weights: Any = dataclasses.field(repr=False)

    def denoise(self, xt: Float[Array, "b h w c"], t: Int[Array, " b"]) -> Float[Array, "b h w c"]:
        """The noise estimate [B, H, W, C] for xt at noise level t, int32 [B] in [0, T)."""
        return _denoise(self.model, self.diffusion, self.weights, xt, t)

    def logits(
        self, x: Float[Array, "b h w c"], t: Int[Array, " b"] | int = 0
    ) -> Float[Array, "b k"]:
        """Logits [B, K] for x at noise level t. t = 0 is what "the class of an image" means."""
        t = jnp.broadcast_to(jnp.asarray(t, jnp.int32), x.shape[:1])
        return _logits(self.model, self.weights, x, t)

    @property
    def params(self) -> Any:
        """The parameters alone."""
        return self.weights["params"]

    @functools.cached_property
    def digest(self) -> str:
        """A short name of the weights: what was made by the same ones can be told by it."""
        return digest(jax.tree.leaves(self.weights))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its images."""
        return (self.model.image_size, self.model.image_size, self.model.image_channels)


def load(path: str | os.PathLike, step: int | None = None) -> Joint:
    """The trained model in a work folder (or at <work folder>/checkpoints/<step>), or packaged.

    path: a string that is the name of a packaged model (pretrained.PRETRAINED: "digits") means that
    one; a work folder of the same name is "./digits". step: which checkpoint; the newest where none
    is named. Reads weights and config only, and verifies their checksums. The weights are laid on
    all devices of this host, as float32 where they were saved with fewer bits too.

    Raises checkpoint.CheckpointError where the path holds no checkpoint or a damaged one.
    """
    if path in PRETRAINED and checkpoint.steps(path):
        warnings.warn(
            f"{path!r} is the packaged model; the work folder of that name here is './{path}'",
            stacklevel=2,
        )
    workdir = epath.Path(PRETRAINED.get(path, path))
    if workdir.parent.name == "checkpoints" and workdir.name.isdecimal() and step is None:
        workdir, step = workdir.parent.parent, int(workdir.name)
    step = _newest(workdir) if step is None else step
    config = configs.from_dict(checkpoint.read_config(workdir, step))
    model, diffusion = JointModel(**config.model), Diffusion(**config.diffusion)
    target = abstract_weights(model, replicated(local_mesh()))
    weights = checkpoint.restore(workdir, step, weights=target, widen=True)["weights"]
    return Joint(config, model, diffusion, weights)


def _newest(workdir: epath.Path) -> int:
    """Its newest checkpoint's step; where there is none, the error tells of the packaged models."""
    try:
        return checkpoint.newest(workdir)
    except checkpoint.CheckpointError as error:
        known = ", ".join(PRETRAINED)
        raise checkpoint.CheckpointError(f"{error}; packaged models: {known}") from None


def abstract_weights(model: JointModel, sharding: jax.sharding.Sharding) -> Any:
    """Shapes, dtypes and sharding of the model's {params, batch_stats}."""
    check_shape(model)
    x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros((1,), jnp.int32))
    shapes = {"batch_stats": {}, **shapes}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def opened(joint: "Joint | str | os.PathLike") -> Joint:
    """The Joint itself, or the one at that path: every public function takes either."""
    return joint if isinstance(joint, Joint) else load(joint)


def named(joint: "Joint | str | os.PathLike | None") -> str | None:
    """What to write down of a Joint that was given: its path, where that is what was given."""
    if joint is None:
        return None
    return "a Joint" if isinstance(joint, Joint) else os.fspath(joint)


def check_images(joint: Joint, images: Any) -> np.ndarray:
    """Images [N, H, W, C] as the network takes them: uint8, or float32 in [-1, 1].

    Raises ValueError for another shape, dtype or range; warns where floats are never negative.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != joint.image_shape:
        raise ValueError(
            f"images have the shape {images.shape}; this model takes [N, H, W, C] = "
            f"(N, {', '.join(map(str, joint.image_shape))})"
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images have the dtype {images.dtype}; uint8 or float is allowed")
    if images.size:
        low, high = float(images.min()), float(images.max())
        if not (low >= -1 and high <= 1):  # also where there is a NaN
            raise ValueError(
                f"float images range over [{low:g}, {high:g}]; they must lie in [-1, 1], or be "
                "uint8 in [0, 255]"
            )
        if low >= 0:
            warnings.warn(
                f"float images range over [{low:g}, {high:g}] and are taken to lie in [-1, 1]; if "
                "they lie in [0, 1], pass 2 * images - 1",
                stacklevel=3,
            )
    return images.astype(np.float32)


def classify(
    joint: "Joint | str | os.PathLike", images: Any, *, batch_size: int = 256
) -> Float[np.ndarray, "n k"]:
    """Class probabilities, float32 [N, K], of uint8 images [N, H, W, C], or floats in [-1, 1].

    batch_size: how many go through the network at once. Rows sum to 1; of a multi-label model each
    entry is the probability of its own class.

    Raises ValueError for images of another shape, dtype or range.
    """
    joint = opened(joint)
    images = check_images(joint, images)
    probabilities, rows = jax.nn.sigmoid if joint.model.multi_label else jax.nn.softmax, []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        pad = min(batch_size, len(images)) - len(batch)
        batch = np.pad(batch, ((0, pad), (0, 0), (0, 0), (0, 0)))
        x = pixels_to_float(jnp.asarray(batch)) if batch.dtype == np.uint8 else jnp.asarray(batch)
        rows.append(np.asarray(probabilities(joint.logits(x)))[: len(batch) - pad])
    return np.concatenate(rows) if rows else np.zeros((0, joint.model.num_classes), np.float32)
