"""jdm.training.step: what one step does to a state, with losses and networks that are tiny."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdm.training.step import STREAMS, TrainState, ema_decay, step_keys, train_step

ROOT = jax.random.key(3)


def bits(key) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


# Keys.


def test_every_stream_of_every_step_has_a_key_of_its_own():
    seen = {bits(key) for step in range(50) for key in step_keys(ROOT, jnp.int32(step)).values()}
    assert len(seen) == 50 * len(STREAMS)
    assert not seen & {bits(key) for key in step_keys(jax.random.key(4), jnp.int32(0)).values()}


def test_keys_follow_from_the_root_and_the_step_alone():
    first, again = (step_keys(jax.random.key(3), jnp.int32(7)) for _ in range(2))
    assert list(first) == ["t", "noise", "dropout", "augment"]  # a new stream goes at the end
    assert {name: bits(key) for name, key in first.items()} == {
        name: bits(key) for name, key in again.items()
    }


def test_a_stream_does_not_change_with_those_that_came_after_it():
    key = jax.random.fold_in(ROOT, 7)
    for i, name in enumerate(("t", "noise", "dropout")):
        assert bits(step_keys(ROOT, jnp.int32(7))[name]) == bits(jax.random.fold_in(key, i))


# The moving average.


@pytest.mark.parametrize(
    "step, decay, expected",
    [(0, 0.999, 0.1), (1, 0.999, 2 / 11), (90, 0.999, 0.91), (10**6, 0.999, 0.999), (90, 0.5, 0.5)],
)
def test_ema_decay_is_short_at_first(step, decay, expected):
    np.testing.assert_allclose(ema_decay(jnp.int32(step), decay), expected, rtol=1e-6)


def quadratic(params, batch, keys):
    """Half the squared distance to the batch's target, which has the gradient params - target."""
    loss = 0.5 * ((params["w"] - batch["target"]) ** 2).sum()
    return loss, {"loss": (loss, jnp.ones(()))}


def start(optimiser, w) -> TrainState:
    params = {"w": jnp.asarray(w, jnp.float32)}
    return TrainState(jnp.int32(0), params, params, optimiser.init(params))


def test_three_steps_of_gradient_descent_and_of_the_moving_average():
    optimiser, target = optax.sgd(0.5), np.array([1.0, -2.0])
    state = start(optimiser, [0.0, 4.0])
    w, ema = np.array([0.0, 4.0]), np.array([0.0, 4.0])
    for t in range(3):
        gradient = w - target
        w = w - 0.5 * gradient
        keep = min(0.15, (1 + t) / (10 + t))  # 0.1 at first, then 0.15
        ema = keep * ema + (1 - keep) * w
        batch = {"target": jnp.asarray(target, jnp.float32)}
        state, averages = train_step(
            state, batch, ROOT, loss_fn=quadratic, optimiser=optimiser, decay=0.15
        )
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
        np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5)
        assert state.step == t + 1
        norm, count = averages["gradient_norm"]
        np.testing.assert_allclose(norm / count, np.linalg.norm(gradient), rtol=1e-6)
        assert averages["loss"][0] == 0.5 * (gradient**2).sum()


def test_the_loss_is_given_the_keys_of_its_step():
    given = []

    def loss_fn(params, batch, keys):
        given.append({name: bits(key) for name, key in keys.items()})
        return quadratic(params, batch, keys)

    optimiser = optax.sgd(0.1)
    state = start(optimiser, [0.0])
    for _ in range(3):
        state, _ = train_step(
            state, {"target": jnp.ones(1)}, ROOT, loss_fn=loss_fn, optimiser=optimiser, decay=0.9
        )
    for step, keys in enumerate(given):
        expected = step_keys(ROOT, jnp.int32(step))
        assert keys == {name: bits(key) for name, key in expected.items()}


# A real network.


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def trained(tiny_run):
    """(state after 20 steps on one batch, the averages of each)."""
    return tiny_run.steps(tiny_run.start(), 20)


def test_a_run_starts_at_step_zero_with_the_average_equal_to_the_weights(tiny_run):
    state = tiny_run.start()
    assert state.step == 0 and state.step.dtype == jnp.int32
    for param, ema in zip(leaves(state.params), leaves(state.ema), strict=True):
        np.testing.assert_array_equal(param, ema)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, tiny_run.run.state))
    assert shapes[0] == shapes[1]


def test_another_seed_starts_elsewhere(tiny_run):
    kernels = [
        tiny_run.run.init(jax.random.key(s)).params["unet"]["stem"]["kernel"] for s in (0, 1)
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_the_loss_falls_on_a_fixed_batch(trained):
    _, seen = trained
    for name, share in {"loss": 0.8, "cross_entropy": 0.95}.items():
        values = [averages[name] for averages in seen]
        assert np.mean(values[-5:]) < share * np.mean(values[:5])
    assert all(np.isfinite(value) for averages in seen for value in averages.values())


def test_training_moves_every_weight_and_the_average_lags_behind(tiny_run, trained):
    state, _ = trained
    for before, after, ema in zip(
        leaves(tiny_run.start().params), leaves(state.params), leaves(state.ema), strict=True
    ):
        assert (before != after).all() or np.mean(before != after) > 0.9
        assert (ema != after).any()
    assert state.step == 20


def test_training_moves_the_learned_variance(tiny_run, trained):
    params = trained[0].params
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)), jnp.float32)
    raw, _ = jax.jit(tiny_run.run.model.apply)({"params": params}, x, jnp.full((4,), 30, jnp.int32))
    mean, variance = np.split(np.asarray(raw), 2, axis=-1)
    assert np.abs(variance).max() > 1e-3 and np.abs(mean - variance).max() > 1e-3  # both began at 0


def test_a_step_is_the_same_bit_for_bit(tiny_run):
    (one, seen), (two, again) = (tiny_run.steps(tiny_run.start(), 2) for _ in range(2))
    assert seen == again
    for a, b in zip(leaves(one), leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_consumes_the_state_it_is_given(tiny_run):
    state = tiny_run.start()
    tiny_run.steps(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jdm.mesh import make_mesh, replicated, to_global
from jdm.training.build import build
sys.path.insert(0, {here!r})
from conftest import tiny_config

assert jax.device_count() == 8
given = dict(np.load(sys.argv[1]))
batch = {{name: given.pop(name) for name in ("image", "label")}}
mesh = make_mesh()
run = build(tiny_config(), replicated(mesh))
names = sorted(given, key=lambda name: int(name))
state = jax.tree.unflatten(jax.tree.structure(run.state), [given[name] for name in names])
state = jax.device_put(state, replicated(mesh))
batch = to_global(batch, mesh)
assert len(batch["image"].addressable_shards) == 8
assert batch["image"].addressable_shards[0].data.shape[0] == 2
for _ in range(2):
    state, averages = run.step(state, batch, jax.random.key(1))
losses = {{name: float(total / count) for name, (total, count) in averages.items()}}
arrays = {{str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}}
np.savez(sys.argv[2], **arrays, **losses)
"""


def test_eight_devices_compute_what_one_does(tiny_run, tmp_path):
    """Two steps, on a batch whose labels are missing on the first devices."""
    state = tiny_run.start()
    arrays = {str(i): leaf for i, leaf in enumerate(leaves(state))}
    np.savez(tmp_path / "in.npz", **arrays, **tiny_run.batch)
    code = EIGHT_DEVICES.format(here=str(Path(__file__).parent))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        timeout=120,
    )
    state, seen = tiny_run.steps(state, 2)
    ours = np.load(tmp_path / "out.npz")
    for name, value in seen[-1].items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4)
    given = jax.tree.unflatten(jax.tree.structure(state), [ours[i] for i in arrays])
    moments = [leaves(s.optimiser) for s in (state, given)]
    for one, eight in zip(*moments, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-4 * np.abs(one).max() + 1e-7)
    # Adam divides by the gradient's own size: a weight whose gradient is 0 but for its last digits
    # (a bias before a normalisation) may go anywhere. There are few of them.
    one, eight = (np.concatenate([x.ravel() for x in leaves(s.params)]) for s in (state, given))
    assert np.quantile(np.abs(one - eight), 0.98) < 1e-4
