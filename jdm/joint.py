"""Joint: a trained joint model with its weights.

Owns loading, and the two functions of a model that sampling and analysis use: the estimate of the
noise, and the logits. Does not train, sample or plot.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jdm import checkpoint, hub, model_file
from jdm.config import config_from_dict, with_exec
from jdm.diffusion.guidance import Network, log_probabilities_of
from jdm.diffusion.process import Diffusion, to_floats
from jdm.errors import NO_VALUE, Failure, InvalidValue
from jdm.files import location
from jdm.mesh import Devices, in_batches, local_mesh, mesh_of, shardings, whole
from jdm.nn.model import JointModel, make_model, weight_shapes
from jdm.nn.unet import block_names
from jdm.numerics import fixed_flags
from jdm.options import POSITIVE, Option, is_float
from jdm.pretrained import PRETRAINED
from jdm.storage import storage_of
from jdm.trees import digest

HALF_LEVEL = 0.5 / 127.5  # of a pixel, for floats in [-1, 1]: rounding to uint8 removes as much
BEST = "best"  # in place of a step: the checkpoint with the best value of a metric
PIXELS = 20.0  # above all values of noised images in [-1, 1], and below some in [0, 255]


def make_network(model: JointModel, diffusion: Diffusion, weights: Any) -> Network:
    """A model and its weights as the functions that guidance and samplers call."""

    def apply(method, *args):
        return model.apply(weights, *args, method=method)

    return Network(
        encode=functools.partial(apply, "encode"),
        decode=lambda features, x, t: diffusion.estimate(apply("decode", features, t), x, t),
        log_probabilities=lambda features, t: log_probabilities_of(
            apply("classify", features, t), model.multi_label
        ),
        block_names=block_names(len(model.multipliers), model.blocks),
    )


def image_shape(model: JointModel) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (model.image_size, model.image_size, model.image_channels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _denoise(model, diffusion, weights, xt, t):
    network = make_network(model, diffusion, weights)
    return network.decode(network.encode(xt, t), xt, t).eps


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, weights, x, t):
    """See Joint.logits."""
    return model.apply(weights, model.apply(weights, x, t, method="encode"), t, method="classify")


@dataclasses.dataclass(frozen=True)
class Joint:
    """A joint model, its diffusion and its weights.

    config: the config it was trained with. weights: {"params", "batch_stats"}: the EMA of the
    parameters, and of the head's running statistics ({} for a head without them). They lie on the
    devices as config.exec.mesh says; what computes with them takes them `mesh.whole`. dataset: what
    it was trained on, see jdm.data.identity; {} where that is unknown. step: of the checkpoint it
    was loaded from; None where there is none.
    """

    config: ConfigDict
    model: JointModel
    diffusion: Diffusion
    weights: Any = dataclasses.field(repr=False)
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    step: int | None = None

    @property
    def mesh(self) -> Mesh:
        """This host's devices that its weights are on, and that it is sampled and evaluated on."""
        return mesh_of(self.weights) or local_mesh()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes 0 to K - 1, or of the attributes; () where they are unknown, as
        in checkpoints of version 0.1 and in converted ones."""
        return tuple(self.dataset.get("class_names", ()))

    @fixed_flags()
    def denoise(self, xt: Any, t: Any) -> Float[Array, "b h w c"]:
        """The noise estimate, float32 [B, H, W, C], for xt at noise level t.

        xt: floats [B, H, W, C], images in [-1, 1] with noise. t: integers in [0, T), [B] or one for
        all. May be called inside jit; then only shapes and dtypes are checked, and not values.

        Raises InvalidValue, naming the argument, for another shape or dtype, a t outside [0, T),
        and an xt that is not finite; also where the model was not trained to generate. Warns of an
        xt that seems to be pixels.
        """
        check_trained(self, "diffusion")
        xt, t = check_noised(self, "xt", xt, t)
        return _denoise(self.model, self.diffusion, whole(self.weights), xt, t)

    @fixed_flags()
    def logits(self, x: Any, t: Any = 0) -> Float[Array, "b k"]:
        """Logits, float32 [B, K], for x at noise level t; clean images have t = 0.

        x, t: see `denoise`, with the same errors. For uint8 images see `classify`.
        """
        check_trained(self, "classifier")
        x, t = check_noised(self, "x", x, t)
        return logits_of(self.model, whole(self.weights), x, t)

    @property
    def params(self) -> Any:
        """The EMA of the parameters, a tree of arrays: {"unet", "head"}."""
        return self.weights["params"]

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the weights."""
        return digest(jax.tree.leaves(whole(self.weights)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return image_shape(self.model)

    @property
    def has_diffusion(self) -> bool:
        """Whether the model was trained to generate."""
        return "diffusion" in self.config.loss.terms

    @property
    def has_classifier(self) -> bool:
        """Whether the model was trained to classify."""
        return "classifier" in self.config.loss.terms and self.config.loss.weight != 0


@fixed_flags()
def load(
    path: str | os.PathLike, step: int | str | None = None, devices: Devices = None, **exec: Any
) -> Joint:
    """A trained model, from a work folder, one of its checkpoints, the package, or the hub.

    path: a work folder (also gs://bucket/folder), <work folder>/checkpoints/<step>, the name of a
    packaged model ("digits"; a work folder of that name is "./digits"), or what `jdm push` has
    sent: hf://owner/name, with @revision for another one than main, or a folder with these files.
    step: which checkpoint; None is the newest, and "best" the one with the best value of
    config.checkpoint.best, which is also <work folder>/checkpoints/best. devices: those of
    jax.local_devices() that the weights are on, and over which sampling and evaluation split their
    images; None is all. exec: values that replace those of the config's section exec, such as
    dtype="bfloat16", or mesh="fsdp", which splits the weights: each device has a part between two
    calls, and all of them during one. Reads only the weights, the config and what the data was, and
    verifies their checksums. The weights are float32, even where the file has fewer bits.

    Raises checkpoint.CheckpointError where the path holds no checkpoint or a damaged one,
    InvalidValue for a wrong value of devices, exec or $JAX_PLATFORMS, for a path that cannot be
    one, see hub.model_path, for a bucket that does not exist or may not be read, and for a
    repository that does not exist or holds no model; Failure where the bucket or the hub cannot be
    reached, and where the files of a model are damaged.
    """
    if path in PRETRAINED and checkpoint.steps(path):
        warnings.warn(
            f"{path!r} is the packaged model; the work folder of that name here is './{path}'",
            stacklevel=3,
        )
    if at := hub.address("path", path):
        folder = hub.fetch("path", at, model_file.NAMES, lambda file: _check_config(file, at))
        return _of_files(folder, str(at), step, devices, exec)
    packaged = PRETRAINED.get(path) if isinstance(path, str) else None
    workdir = epath.Path(packaged or location("path", path))
    storage = storage_of(workdir)
    storage.check("path", workdir)
    if storage.renames and model_file.is_model(workdir):
        return _of_files(Path(workdir), str(workdir), step, devices, exec)
    named = workdir.name == BEST or workdir.name.isdecimal()
    if workdir.parent.name == "checkpoints" and named and step is None:
        workdir, step = workdir.parent.parent, workdir.name
    step = _step(workdir, step)
    mesh = local_mesh(devices)  # before Orbax starts JAX, whose error would be a long one
    config = with_exec(config_from_dict(checkpoint.read_config(workdir, step)), **exec)
    model, diffusion = make_model(config.model, config.exec), Diffusion(**config.diffusion)
    target = abstract_weights(model, mesh, config.exec.mesh)
    weights = checkpoint.restore(workdir, step, weights=target, widen=True)["weights"]
    dataset = _data(workdir, step).get("dataset", {})
    return Joint(config, model, diffusion, weights, dataset, step)


def _check_config(file: Path, at: hub.Address) -> None:
    """Raises InvalidValue where the config.json of a repository is not one of jdm."""
    try:
        config_from_dict(model_file.read_config(file.parent))
    except (Failure, InvalidValue) as error:
        raise InvalidValue("path", str(at), f"is not a model of jdm: {error}") from None


def _of_files(
    folder: Path, shown: str, step: int | str | None, devices: Devices, exec: dict[str, Any]
) -> Joint:
    """The model in the files of `model_file`. shown: their folder or address, for errors."""
    mesh = local_mesh(devices)
    config = with_exec(config_from_dict(model_file.read_config(folder)), **exec)
    model, diffusion = make_model(config.model, config.exec), Diffusion(**config.diffusion)
    stored = model_file.read(folder, abstract_weights(model, mesh, config.exec.mesh))
    if step not in (None, stored.step):
        raise InvalidValue("step", step, f"is not there: {shown} holds step {stored.step} alone")
    joint = Joint(config, model, diffusion, stored.weights, stored.dataset, stored.step)
    if joint.digest != stored.digest:
        raise Failure(f"the weights of {shown} are damaged: they differ from their digest")
    return joint


def _step(workdir: epath.Path, step: int | str | None) -> int:
    """The number of a step that `load` was given. Raises CheckpointError where there is none."""
    if step is not None and step != BEST:
        return int(step)
    try:
        newest = checkpoint.newest(workdir)
    except checkpoint.CheckpointError as error:
        known = ", ".join(PRETRAINED)
        raise checkpoint.CheckpointError(f"{error}; packaged models: {known}") from None
    if step is None:
        return newest
    if (best := _data(workdir, newest).get("best", {}).get("step")) is None:
        said = "has no best checkpoint: it was trained without config.checkpoint.best"
        raise checkpoint.CheckpointError(f"{workdir} {said}")
    return best


def _data(workdir: epath.Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of its data; {} of a converted model, which has none."""
    has_data = "data" in checkpoint.items(workdir, step)
    return checkpoint.read_data(workdir, step) if has_data else {}


def abstract_weights(model: JointModel, mesh: Mesh, name: str = "data") -> Any:
    """The model's {params, batch_stats} as shapes, dtypes and sharding. name: of mesh.MESHES."""
    shapes = {"batch_stats": {}, **weight_shapes(model)}
    return jax.tree.map(
        lambda s, lies: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=lies),
        shapes,
        shardings(shapes, mesh, name),
    )


def as_joint(joint: "Joint | str | os.PathLike", parameter: str = "joint") -> Joint:
    """The Joint itself, or the one loaded from a path: public functions take either."""
    if isinstance(joint, Joint):
        return joint
    try:
        return load(joint)
    except InvalidValue as error:
        raise (error.about(parameter) if error.parameter == "path" else error) from None


def check_trained(joint: Joint, term: str) -> None:
    """Raises InvalidValue where the model was trained without "diffusion" or "classifier"."""
    if term == "diffusion" and not joint.has_diffusion:
        raise InvalidValue("joint", NO_VALUE, "is a model that was trained to classify alone")
    if term == "classifier" and not joint.has_classifier:
        raise InvalidValue("joint", NO_VALUE, "is a model that was trained without a classifier")


def name_of(joint: "Joint | str | os.PathLike") -> str:
    """How settings name a model: by its path, where it was given as one."""
    return "a Joint" if isinstance(joint, Joint) else os.fspath(joint)


def _refuse(parameter: str, allowed: str, hint: str = "") -> NoReturn:
    raise InvalidValue(parameter, NO_VALUE, allowed, hint)


def _check_shape(joint: Joint, parameter: str, verb: str, x: Any) -> None:
    if x.ndim != 4 or x.shape[1:] != joint.image_shape:
        takes = ", ".join(map(str, joint.image_shape))
        refused = f"{verb} the shape {x.shape}; this model takes [N, H, W, C] = (N, {takes})"
        _refuse(parameter, refused)


def check_images(joint: Joint, images: Any, least: int = 0) -> np.ndarray:
    """The images [N, H, W, C], checked: uint8, or float32 in [-1, 1]. least: the smallest N.

    Floats may have any precision. Those that are outside [-1, 1] by up to half a pixel level, as
    after rounding, are clipped. Raises InvalidValue for another number, shape, dtype or range;
    warns where no float is negative.
    """
    images = np.asarray(images)
    _check_shape(joint, "images", "have", images)
    if len(images) < least:
        _refuse("images", f"are {len(images) or 'none'}; there must be at least {least}")
    if images.dtype == np.uint8:
        return images
    if not is_float(images):
        _refuse("images", f"have the dtype {images.dtype}; uint8 or float is allowed")
    images = images.astype(np.float32)
    if images.size:
        low, high = float(images.min()), float(images.max())
        if not (low >= -1 - HALF_LEVEL and high <= 1 + HALF_LEVEL):  # also where there is a NaN
            _refuse(
                "images",
                f"are floats that range over [{low:g}, {high:g}]; floats must lie in [-1, 1], or "
                "images be uint8 in [0, 255]",
            )
        if low >= 0:
            warnings.warn(
                f"float images range over [{low:g}, {high:g}] and are taken to lie in [-1, 1]; if "
                "they lie in [0, 1], pass 2 * images - 1",
                stacklevel=4,
            )
    return images.clip(-1, 1)


def check_noise(joint: Joint, parameter: str, x: Any) -> Any:
    """Noise or noised images [B, H, W, C], checked, as float32. Values are checked if x is
    concrete, that is outside jit: they must be finite. Raises InvalidValue; see `Joint.denoise`."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    _check_shape(joint, parameter, "has", x)
    if not is_float(x):
        hint = "of uint8 images, pixels / 127.5 - 1 are" if x.dtype == np.uint8 else ""
        _refuse(parameter, f"has the dtype {x.dtype}; floats are needed", hint)
    with np.errstate(over="ignore"):  # what overflows is refused
        x = x.astype(np.float32)
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
        _refuse(parameter, "has values that are not finite as float32")
    return x


def check_noised(joint: Joint, parameter: str, x: Any, t: Any) -> tuple[Any, Any]:
    """(x float32 [B, H, W, C], t int32 [B]), checked; see `Joint.denoise`."""
    x = check_noise(joint, parameter, x)
    if not isinstance(x, jax.core.Tracer) and np.abs(np.asarray(x)).max(initial=0) > PIXELS:
        warnings.warn(
            f"{parameter} has values above {PIXELS:g}, but is taken for images in [-1, 1] with "
            "noise; of pixels in [0, 255], pass pixels / 127.5 - 1",
            stacklevel=4,
        )
    t = t if isinstance(t, jax.Array) else np.asarray(t)
    if t.shape not in ((), x.shape[:1]) or t.dtype.kind not in "iu":
        _refuse("t", f"must be one integer, or {len(x)} for as many images, not {t.dtype}{t.shape}")
    if not isinstance(t, jax.core.Tracer):
        t, steps = np.asarray(t), joint.diffusion.steps
        if ((t < 0) | (t >= steps)).any():
            wrong = t[(t < 0) | (t >= steps)].flat[0]
            _refuse("t", f"holds {wrong}; noise levels lie in [0, {steps})")
    return x, jnp.broadcast_to(t.astype(np.int32), x.shape[:1])


@fixed_flags()
def classify(
    joint: "Joint | str | os.PathLike", images: Any, *, batch_size: int = 256, names: bool = False
) -> Float[np.ndarray, "n k"] | list[dict[str, float]]:
    """Class probabilities, float32 [N, K]. Each row sums to 1; with a multi-label model each entry
    is the probability of one attribute.

    images: uint8 [N, H, W, C], or floats of any precision in [-1, 1]; those outside by up to half a
    pixel level (1 / 255), as after rounding, are clipped. batch_size: images in one forward pass.
    names: return {name of a class: its probability}, the most probable first, for each image
    instead.

    Raises InvalidValue for images of another shape, dtype or range, where the model was trained
    without a classifier, and for `names` where the model does not know them.
    """
    joint = as_joint(joint)
    check_trained(joint, "classifier")
    if names and not joint.class_names:
        unknown = "cannot be given: this checkpoint does not hold the names of its classes"
        raise InvalidValue("names", True, unknown)
    images = check_images(joint, images)
    Option(256, "", POSITIVE).check("batch_size", batch_size)
    probabilities = jax.nn.sigmoid if joint.model.multi_label else jax.nn.softmax

    def of_batch(weights: Any, batch: Any) -> Any:
        t = jnp.zeros(len(batch), jnp.int32)
        return probabilities(logits_of(joint.model, weights, to_floats(batch), t))

    found = in_batches(of_batch, joint.weights, [images], min(batch_size, len(images)))
    if not names:
        return found
    order = np.argsort(-found, axis=1, kind="stable")
    return [
        {joint.class_names[k]: float(row[k]) for k in ranked}
        for row, ranked in zip(found, order, strict=True)
    ]
