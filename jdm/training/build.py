"""From config sections to the parts of a training run.

Owns the optimiser, and builds in this order: the shapes of the state, its shardings, and a jitted
init that creates each array on its devices, so that no device ever holds more than its part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict
from optax import GradientTransformation

from jdm import names
from jdm.diffusion.process import Diffusion
from jdm.errors import InvalidValue
from jdm.mesh import check_batch, replicated, shardings
from jdm.nn.model import JointModel, example_inputs, make_model
from jdm.numerics import key_of
from jdm.target import platform
from jdm.training.loss import JointLoss
from jdm.training.step import TrainState, init_state, train_step
from jdm.training.t_sampler import T_SAMPLERS

# The learning rate after the warm-up: (peak, number of remaining steps) -> optax schedule, or None
# where it stays at the peak, whatever the number of steps.
LR_SCHEDULES: dict[str, Callable | None] = names.LR_SCHEDULES.records(
    constant=None, cosine=lambda lr, steps: optax.cosine_decay_schedule(lr, max(steps, 1))
)


def learning_rate(
    *, lr: float, schedule: str, warmup_steps: int, total_steps: int, **_: Any
) -> optax.Schedule:
    """The learning rate of each step: it rises linearly to `lr`, then follows `schedule` to
    total_steps. Raises InvalidValue for an unknown schedule."""
    names.check_name("config.optim.schedule", schedule, LR_SCHEDULES)
    make = LR_SCHEDULES[schedule]
    after = make(lr, total_steps - warmup_steps) if make else optax.constant_schedule(lr)
    warmup = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after


def make_optimiser(
    *, lr: float, schedule: str, warmup_steps: int, total_steps: int, clip_norm: float, **adamw: Any
) -> GradientTransformation:
    """AdamW, with the learning rate of `learning_rate`.

    clip_norm: upper limit of the gradient's global norm; 0 is no limit. adamw: b1, b2 and
    weight_decay. Raises InvalidValue for an unknown schedule.
    """
    rate = learning_rate(
        lr=lr, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps
    )
    optimiser = optax.adamw(rate, **adamw)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimiser) if clip_norm else optimiser


def freeze_unused(optimiser: GradientTransformation, loss_fn: JointLoss) -> GradientTransformation:
    """The optimiser, applied only to the parameters that the terms of the loss use.

    The other parameters never change, not even by weight decay, and have no moments.
    """
    model, decodes, classifies = loss_fn.model, bool(loss_fn.decoded), bool(loss_fn.classified)
    if decodes and classifies:
        return optimiser

    def used(model, x, t):
        features = model.encode(x, t)
        return decodes and model.decode(features, t), classifies and model.classify(features, t)

    init = functools.partial(model.init, method=used)
    params = jax.eval_shape(init, key_of(0), *example_inputs(model))["params"]
    trained = {path for path, _ in jax.tree.leaves_with_path(params)}

    def groups(params):
        label = {True: "trained", False: "frozen"}
        return jax.tree.map_with_path(lambda path, _: label[path in trained], params)

    return optax.multi_transform({"trained": optimiser, "frozen": optax.set_to_zero()}, groups)


class Run(NamedTuple):
    """The parts of a training run.

    state: the shapes, dtypes and shardings of the TrainState. init: root key -> TrainState, jitted.
    step: (state, batch, root key) -> (state, metrics), jitted; it donates its argument `state`.
    """

    model: JointModel
    diffusion: Diffusion
    state: TrainState
    init: Callable[..., TrainState]
    step: jax.stages.Wrapped


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Run:
    """The parts of a run on a mesh; computes no array.

    The parts are kept, and their compiled programs with them: another run in the same process whose
    config has the same values of what is read here compiles nothing.

    Raises InvalidValue for values that do not fit.
    """
    read = {name: config[name] for name in ("model", "exec", "diffusion", "loss", "optim")}
    train = {name: config.train[name] for name in ("t_sampler", "ema_decay", "ema_warmup")}
    train["steps"] = config.train.steps if LR_SCHEDULES.get(config.optim.schedule) else 0
    return _build(FrozenConfigDict(read | {"train": train}), mesh)


@functools.lru_cache(maxsize=8)
def _build(config: FrozenConfigDict, mesh: jax.sharding.Mesh) -> Run:
    model, diffusion = make_model(config.model, config.exec), Diffusion(**config.diffusion)
    loss_fn = JointLoss(model, diffusion, config.loss)
    optimiser = make_optimiser(**config.optim, total_steps=config.train.steps)
    optimiser = freeze_unused(optimiser, loss_fn)
    name = names.check_name("config.train.t_sampler", config.train.t_sampler, T_SAMPLERS)
    t_sampler = T_SAMPLERS[name](diffusion.steps)
    if t_sampler.term and t_sampler.term not in loss_fn.terms:
        missing = f"config.loss.terms={tuple(config.loss.terms)} leaves out"
        allowed = f"depends on the {t_sampler.term} term, which {missing}"
        raise InvalidValue("config.train.t_sampler", name, allowed, "uniform is needed")
    init = functools.partial(init_state, model, optimiser, t_sampler)
    parts = dict(loss_fn=loss_fn, t_sampler=t_sampler, optimiser=optimiser)
    ema = dict(decay=config.train.ema_decay, warmup=config.train.ema_warmup)
    whole = replicated(mesh)
    state_sharding: Any = whole  # of every array
    if config.exec.mesh != "data":
        state_sharding = state_shardings(jax.eval_shape(init, key_of(0)), mesh, config.exec.mesh)
        constrain = jax.lax.with_sharding_constraint
        parts["gather"] = lambda params: constrain(params, whole)
        # Whole first, so that XLA does not split the computation of the gradient by channels.
        parts["split"] = lambda tree: constrain(constrain(tree, whole), state_sharding.params)
    step = functools.partial(train_step, **parts, **ema, accumulate=config.exec.accumulate)
    # The init runs once. On a CPU, optimising its program takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if platform() == "cpu" else None
    init_fn = jax.jit(init, out_shardings=state_sharding, compiler_options=options)
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, whole))
    return Run(model, diffusion, init_fn.eval_shape(key_of(0)), init_fn, step_fn)


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh, name: str) -> TrainState:
    """Where a state lies. name: of jdm.mesh.MESHES. Only the parameters, their EMA and the
    optimiser's state are split: draws of t must not depend on the devices by rounding errors."""
    rest = {field: getattr(state, field) for field in ("step", "batch_stats", "t_history")}
    split = {field: getattr(state, field) for field in ("params", "ema", "optimiser")}
    return TrainState(**shardings(rest, mesh, "data"), **shardings(split, mesh, name))


def check_batch_of(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises InvalidValue where the batch does not divide by the devices, in each of its parts."""
    parts, name = config.exec.accumulate, "config.data.batch_size"
    name += " / config.exec.accumulate" * (parts > 1)
    check_batch(config.data.batch_size // parts, mesh, name)


def abstract_batch(config: ConfigDict, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """A global batch as shapes, dtypes and sharding."""
    model, rows = config.model, config.data.batch_size
    image = (rows, model.image_size, model.image_size, model.image_channels)
    label = ((rows, model.num_classes), np.int8) if model.multi_label else ((rows,), np.int32)
    return {
        "image": jax.ShapeDtypeStruct(image, np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct(*label, sharding=sharding),
    }
