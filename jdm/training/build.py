"""From config sections to what a training run is made of.

Owns the optimiser and the order of building: abstract state first, then shardings, then a jitted
init that creates every array where it will live, so that no device ever holds more than its part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jdm.diffusion.process import Diffusion, pick
from jdm.nn.model import JointModel, check_shape
from jdm.training.loss import JointLoss
from jdm.training.step import TrainState, init_state, train_step
from jdm.training.t_sampler import T_SAMPLERS

# What the learning rate does after the warm-up: (peak, steps left) -> schedule.
SCHEDULES: dict[str, Callable] = {
    "constant": lambda lr, steps: optax.constant_schedule(lr),
    "cosine": lambda lr, steps: optax.cosine_decay_schedule(lr, max(steps, 1)),
}


def make_optimiser(
    *,
    lr: float,
    schedule: str,
    warmup_steps: int,
    weight_decay: float,
    clip_norm: float,
    b1: float,
    b2: float,
    total_steps: int,
) -> optax.GradientTransformation:
    """AdamW, its learning rate warmed up linearly and then following `schedule` to total_steps.

    clip_norm: the gradient's global norm is held to it; 0 leaves it alone.
    """
    after = SCHEDULES[pick("optim.schedule", schedule, SCHEDULES)](lr, total_steps - warmup_steps)
    warmup = optax.linear_schedule(0.0, lr, warmup_steps)
    rate = optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


# What each of loss.terms asks of the model; the parameters it trains are those that this reads.
ASKED: dict[str, Callable] = {
    "joint": lambda model, x, t: model.predict(x, t),
    "diffusion": lambda model, x, t: model.decode(model.encode(x, t), t),
    "classifier": lambda model, x, t: model.classify(model.encode(x, t), t),
}


def of_terms(
    optimiser: optax.GradientTransformation, model: JointModel, terms: str
) -> optax.GradientTransformation:
    """The optimiser of the parameters that the terms train; the others stay as they are.

    They are not decayed either, and no moments are kept of them. terms: one of ASKED.
    """
    if terms == "joint":
        return optimiser
    x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    init = functools.partial(model.init, method=ASKED[terms])
    read = jax.eval_shape(init, jax.random.key(0), x, jnp.zeros((1,), jnp.int32))["params"]
    trained = {path for path, _ in jax.tree.leaves_with_path(read)}

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if path in trained else "frozen", params
        )

    return optax.multi_transform({"trained": optimiser, "frozen": optax.set_to_zero()}, label)


class Run(NamedTuple):
    """What a training run is made of.

    state: the abstract TrainState, with the shardings it will have. init: root key -> TrainState.
    step: (state, batch, root key) -> (state, averages), jitted; the state passed in is consumed.
    """

    model: JointModel
    diffusion: Diffusion
    state: TrainState
    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, Any]]]


def build(config: ConfigDict, state_sharding: jax.sharding.Sharding) -> Run:
    """The parts of a run; nothing is computed yet.

    Raises ValueError, naming the config key, where parts do not fit together.
    """
    model, diffusion = JointModel(**config.model), Diffusion(**config.diffusion)
    check_shape(model)
    loss_fn = JointLoss(model, diffusion, **config.loss)
    optimiser = make_optimiser(**config.optim, total_steps=config.train.steps)
    optimiser = of_terms(optimiser, model, config.loss.terms)
    name = pick("train.t_sampler", config.train.t_sampler, T_SAMPLERS)
    if name != "uniform" and config.loss.terms == "classifier":
        raise ValueError(
            f"train.t_sampler={name!r} learns from the diffusion term, which "
            f"loss.terms={config.loss.terms!r} leaves out; uniform is needed"
        )
    t_sampler = T_SAMPLERS[name](diffusion.steps)
    init = functools.partial(init_state, model, optimiser, t_sampler)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state_sharding),
        jax.eval_shape(init, jax.random.key(0)),
    )
    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        t_sampler=t_sampler,
        optimiser=optimiser,
        decay=config.train.ema_decay,
        warmup=config.train.ema_warmup,
        accumulate=config.train.accumulate,
    )
    # The init runs once; on a CPU, optimising it takes longer than all else about it.
    hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return Run(
        model,
        diffusion,
        abstract,
        jax.jit(init, out_shardings=state_sharding, compiler_options=hurry),
        jax.jit(step, donate_argnums=0, out_shardings=state_sharding),
    )
