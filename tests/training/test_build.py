"""jdm.training.build: the optimiser's closed forms, and what cannot be built."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdm import checkpoint
from jdm.configs import base
from jdm.diffusion.process import Diffusion
from jdm.mesh import make_mesh, replicated
from jdm.nn.model import make_model, weight_shapes
from jdm.training.build import build, freeze_unused, make_optimiser
from jdm.training.loss import JointLoss

SETTINGS = dict(
    lr=0.1,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=0.0,
    b1=0.9,
    b2=0.999,
    total_steps=10,
)


def rates(**changes) -> list[float]:
    """How far each step goes: under a gradient that never changes, Adam goes the learning rate."""
    optimiser = make_optimiser(**{**SETTINGS, **changes})
    params = jnp.zeros(3)
    state, taken = optimiser.init(params), []
    update = jax.jit(optimiser.update)
    for _ in range(SETTINGS["total_steps"]):
        updates, state = update(jnp.asarray([2.0, 2.0, 2.0]), state, params)
        taken.append(-float(updates[0]))
    return taken


def test_a_constant_rate_is_constant():
    np.testing.assert_allclose(rates(), [0.1] * 10, rtol=1e-4)


def test_a_warm_up_rises_evenly_to_the_rate():
    expected = [0, 0.025, 0.05, 0.075, *[0.1] * 6]
    np.testing.assert_allclose(rates(warmup_steps=4), expected, rtol=1e-4)


def test_a_cosine_falls_to_zero_at_the_end_of_training_counted_after_the_warm_up():
    falling = 0.05 * (1 + np.cos(np.pi * np.arange(6) / 6))
    expected = [0, 0.025, 0.05, 0.075, *falling]
    np.testing.assert_allclose(rates(schedule="cosine", warmup_steps=4), expected, rtol=1e-4)


def one_update(params, gradient, **changes):
    optimiser = make_optimiser(**{**SETTINGS, **changes})
    updates, _ = optimiser.update(gradient, optimiser.init(params), params)
    return optax.apply_updates(params, updates)


def test_weight_decay_is_decoupled_from_the_gradient():
    params = jnp.asarray([5.0, -3.0])
    decayed = one_update(params, jnp.zeros(2), weight_decay=0.5)
    np.testing.assert_allclose(decayed, params * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(one_update(params, jnp.zeros(2)), params)


@pytest.mark.parametrize("clip_norm, held", [(0.0, 1.0), (1.0, 0.2), (100.0, 1.0)])
def test_the_gradient_is_held_to_its_norm(clip_norm, held):
    """Seen in Adam's second step, whose size depends on the ratio of the two gradients."""
    optimiser = make_optimiser(**{**SETTINGS, "clip_norm": clip_norm})
    params = jnp.zeros(2)
    first, second = np.array([0.3, 0.4]), np.array([3.0, 4.0])  # norms 0.5 and 5
    state = optimiser.init(params)
    for gradient in (first, second):
        updates, state = optimiser.update(jnp.asarray(gradient, jnp.float32), state, params)
    second = second * held
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    np.testing.assert_allclose(updates, -0.1 * mean / np.sqrt(square), rtol=1e-3)


def test_an_unknown_schedule_is_one_sentence_that_lists_the_known():
    with pytest.raises(
        ValueError, match="^config.optim.schedule='step' is unknown; known: constant, cosine$"
    ):
        make_optimiser(**{**SETTINGS, "schedule": "step"})


def loss_of(*terms: str) -> JointLoss:
    config = base.get_config()
    config.model.update(channels=8, multipliers=(1, 2), blocks=1, attention=(), heads=2)
    config.loss.terms = terms
    return JointLoss(make_model(config.model, config.exec), Diffusion(), config.loss)


@pytest.fixture(scope="module")
def shapes():
    model = loss_of("diffusion").model
    return weight_shapes(model)["params"]


DECODER = {"decoder_0_0", "decoder_0_1", "decoder_1_0", "decoder_1_1", "up_0", "norm", "out"}


@pytest.mark.parametrize(
    "terms, still",
    [
        (("diffusion", "classifier"), set()),
        (("diffusion",), {"head"}),
        (("classifier",), DECODER),
    ],
)
def test_weights_that_no_term_uses_do_not_change(terms, still, shapes):
    """Not by weight decay either, which moves all others; and they have no moments."""
    optimiser = make_optimiser(**{**SETTINGS, "weight_decay": 0.5})
    optimiser = freeze_unused(optimiser, loss_of(*terms))
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state):
        updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates)

    after = step(params, state)
    parts = {**after["unet"], "head": after["head"]}
    assert still < set(parts)
    for name, part in parts.items():
        expected = 1 if name in still else 1 - 0.1 * 0.5
        for leaf in jax.tree.leaves(part):
            np.testing.assert_allclose(leaf, expected, rtol=0 if name in still else 1e-6)
    of_still = sum(leaf.size for name in still for leaf in jax.tree.leaves(parts[name]))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * (size - of_still)


def test_frozen_weights_survive_a_checkpoint(shapes, tmp_path):
    optimiser = freeze_unused(make_optimiser(**SETTINGS), loss_of("diffusion"))
    state = optimiser.init(jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes))
    items = dict(weights={"w": jnp.ones(1)}, train_state={"optimiser": state}, config={"a": 1})
    checkpoint.save(tmp_path, 1, **items, keep=1)
    sharding = replicated(make_mesh())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), {"optimiser": state}
    )
    back = checkpoint.restore(tmp_path, 1, train_state=abstract)["train_state"]
    assert jax.tree.structure(back["optimiser"]) == jax.tree.structure(state)


def test_losses_that_are_not_computed_draw_no_noise_levels():
    config = base.get_config()
    config.loss.terms, config.train.t_sampler = ("classifier",), "loss_second_moment"
    with pytest.raises(ValueError, match=r"^config\.train\.t_sampler=.*loss\.terms=\('classifier"):
        build(config, make_mesh())


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("model", {"attention": (5,)}, "model.attention"),
        ("model", {"heads": 3}, "model.heads"),
        ("model", {"image_size": 7}, "model.image_size"),
        ("diffusion", {"steps": 15}, "diffusion.steps"),
    ],
)
def test_parts_that_do_not_fit_are_named_before_anything_is_computed(section, changes, message):
    config = base.get_config()
    config[section].update(changes)
    with pytest.raises(ValueError, match=rf"^(config\.)?{message}="):
        build(config, make_mesh())
