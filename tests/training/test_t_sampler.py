"""jdm.training.t_sampler: what is remembered, what is drawn, and its importance weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdm import checkpoint
from jdm.training.step import TrainState, train_step
from jdm.training.t_sampler import KEPT, T_SAMPLERS, UNIFORM, History

STEPS = 6
KEY = jax.random.key(5)
OPTIMISER = optax.sgd(1e-3)


@pytest.fixture(scope="module")
def sampler():
    """Compiled for six noise levels."""
    found = T_SAMPLERS["loss_second_moment"](STEPS)
    draw = jax.jit(found.draw, static_argnums=2)
    return found._replace(draw=draw, update=jax.jit(found.update))


def remembered(history: History) -> list[list[float]]:
    """The losses kept at each t, sorted."""
    kept = np.minimum(history.seen, KEPT)
    return [
        sorted(row[:n].tolist()) for row, n in zip(np.asarray(history.losses), kept, strict=True)
    ]


@pytest.mark.parametrize("rows", [7, 40])  # 40: often more than ten of one t in one batch
def test_the_last_ten_losses_at_each_t_are_remembered(sampler, rows):
    rng = np.random.default_rng(0)
    history, expected = sampler.init(), [[] for _ in range(STEPS)]
    for _ in range(12):
        t = rng.integers(0, STEPS, rows) * rng.integers(0, 2, rows)  # half of them 0
        losses = rng.normal(size=rows).astype(np.float32)
        for time, loss in zip(t, losses, strict=True):  # as published: one after the other
            expected[time] = [*expected[time], float(loss)][-10:]
        values = {"diffusion": jnp.asarray(losses), "classifier": jnp.zeros(rows)}
        history = sampler.update(history, jnp.asarray(t, jnp.int32), values)
        assert remembered(history) == [sorted(kept) for kept in expected]
    assert int(history.seen.sum()) == 12 * rows


def full(losses) -> History:
    """A history in which all ten losses at each t are alike but for their sign."""
    signs = jnp.resize(jnp.asarray([1.0, -1.0]), KEPT)
    return History(jnp.asarray(losses)[:, None] * signs, jnp.full(STEPS, KEPT, jnp.int32))


LOSSES = np.array([1.0, 2.0, 0.0, 4.0, 8.0, 1.0])


def test_draws_follow_the_root_of_the_second_moment_and_count_the_inverse(sampler):
    t, importance = (np.asarray(x) for x in sampler.draw(KEY, full(LOSSES), 20_000))
    p = (1 - UNIFORM) * LOSSES / LOSSES.sum() + UNIFORM / STEPS
    seen = np.bincount(t, minlength=STEPS)
    assert np.abs(seen - 20_000 * p).max() < 5 * np.sqrt(20_000 * p.max())
    np.testing.assert_allclose(importance, 1 / (STEPS * p[t]), rtol=1e-4)
    # What it is for: the mean over the draws is that over even draws, of any loss.
    other = np.array([3.0, -1.0, 0.0, 2.0, 5.0, 7.0])
    np.testing.assert_allclose((importance * other[t]).mean(), other.mean(), rtol=0.05)


def test_draws_are_even_until_every_t_has_ten_losses(sampler):
    short = full(LOSSES)._replace(seen=jnp.asarray([10, 10, 9, 10, 10, 10], jnp.int32))
    t, importance = (np.asarray(x) for x in sampler.draw(KEY, short, 20_000))
    np.testing.assert_allclose(importance, 1, rtol=1e-6)
    assert np.abs(np.bincount(t, minlength=STEPS) - 20_000 / 6).max() < 5 * np.sqrt(20_000 / 6)


def test_uniform_draws_remember_nothing():
    uniform = T_SAMPLERS["uniform"](STEPS)
    t, importance = uniform.draw(KEY, uniform.init(), 1000)
    assert uniform.init() is None and uniform.update(None, t, {}) is None
    assert (importance == 1).all() and set(np.asarray(t).tolist()) == set(range(STEPS))


class Falling:
    """A loss of w · t for each row, with the methods of JointLoss that `train_step` calls."""

    def rows(self, batch, t, importance, keys, step):
        return {"t": t * 1.0, "share": importance / len(t)}

    def __call__(self, params, batch_stats, rows, key):
        values = params["w"] * rows["t"]
        return (rows["share"] * values).sum(), (batch_stats, {}, {"diffusion": values})


def steps(sampler, state, count: int):
    """(the state after `count` steps, the losses of each)."""
    seen = []
    for _ in range(count):
        state, metrics = train_step(
            state,
            {"image": jnp.zeros(32)},
            KEY,
            loss_fn=Falling(),
            t_sampler=sampler,
            optimiser=OPTIMISER,
            decay=0.9,
            warmup=True,
            accumulate=2,
        )
        seen.append(float(metrics["loss"][0]))
    return state, seen


def test_a_step_keeps_the_history_and_a_checkpoint_brings_it_back(sampler, tmp_path):
    """What is drawn after resuming is what would have been drawn."""
    weights = {"params": {"w": jnp.ones(())}, "batch_stats": {}}
    optimiser = OPTIMISER.init(weights["params"])
    start = TrainState(
        jnp.int32(0), **weights, ema=weights, optimiser=optimiser, t_history=sampler.init()
    )
    state, _ = steps(sampler, start, 6)
    assert int(state.t_history.seen.sum()) == 6 * 32
    assert (np.asarray(state.t_history.losses)[0] == 0).all()  # t = 0 has the loss 0

    saved, sharding = vars(state), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoint.save(tmp_path, 6, weights=state.ema, train_state=saved, config={"a": 1}, keep=1)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved
    )
    back = TrainState(**checkpoint.restore(tmp_path, 6, train_state=abstract)["train_state"])
    chex.assert_trees_all_equal(back, state)
    assert steps(sampler, back, 3)[1] == steps(sampler, state, 3)[1]
    forgetful = state.replace(t_history=sampler.init())
    assert steps(sampler, forgetful, 3)[1] != steps(sampler, state, 3)[1]
