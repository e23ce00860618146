"""Between two seeds, from an image to noise, and from an image part of the way.

How well an inversion comes back is tested on trained digits, in test_trained.py.
"""

import dataclasses

import jax
import numpy as np
import pytest

import jdm
from jdm.diffusion.method import Method
from jdm.mesh import local_mesh
from jdm.sampling import programs
from jdm.sampling.editing import _arc


def test_the_arc_ends_where_it_should_and_is_as_long_all_the_way():
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=(2, 8, 8, 1))
    arc = _arc(first, last, np.linspace(0, 1, 7))
    np.testing.assert_allclose(arc[0], first, atol=1e-6)
    np.testing.assert_allclose(arc[-1], last, atol=1e-6)
    first, last = first / np.linalg.norm(first), last / np.linalg.norm(last)
    arc = _arc(first, last, np.linspace(0, 1, 7)).reshape(7, -1)
    np.testing.assert_allclose(np.linalg.norm(arc, axis=1), 1, atol=1e-6)
    steps = (arc[1:] * arc[:-1]).sum(axis=1)
    np.testing.assert_allclose(steps, steps[0], atol=1e-6)  # equal angles
    np.testing.assert_allclose(_arc(first, first, np.array([0.3])), first[None], atol=1e-6)


def test_the_ends_of_an_interpolation_are_the_images_of_its_seeds(joint, tiny, assert_same_images):
    options = dict(steps=4, guidance="pixel", scale=30.0, sampler="ddim")
    way = jdm.interpolate(joint, (3, 11), 4, label=2, **options | {"sampler": None})  # ddim
    ends = jdm.sample(joint, seeds=[3, 11, 3, 11], labels=[2], **options)
    assert_same_images(way.images[[0, -1]], ends.images[:2])
    assert (way.images[1] != way.images[2]).any()
    assert way.seeds.tolist() == [3, 3, 11, 11] and way.settings["interpolate"] == [3, 11]
    named = jdm.interpolate(joint, (3, 11), 4, label=2, **options, classifier=tiny)
    assert_same_images(named.images, way.images)
    assert named.settings["classifier"] == str(tiny)


def test_noise_that_is_given_takes_the_place_of_the_seeds_own(joint, assert_same_images):
    from jdm.sampling.editing import _noise

    noise = np.asarray(_noise(joint.model, joint.diffusion, np.arange(4, dtype=np.uint32)))
    assert_same_images(
        jdm.sample(joint, noise=noise, steps=4).images, jdm.sample(joint, 4, steps=4).images
    )


def test_an_edit_of_little_strength_changes_little_and_of_all_nothing_is_left(joint):
    """By a network whose estimate of the noise is 0, so that x_0 is estimated as x_t / a."""
    zero = jax.tree.map(np.zeros_like, joint.weights)
    joint = dataclasses.replace(joint, weights=zero)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    little = jdm.edit(joint, images, [1], strength=0.02, guidance="pixel")
    level = joint.diffusion.abar[0]  # one step, at t = 0
    expected = np.sqrt(1 - level) / np.sqrt(level) * 127.5
    moved = (little.images.astype(float) - images)[(images > 30) & (images < 225)]
    assert 0.8 * expected < moved.std() < 1.2 * expected
    options = dict(strength=1.0, steps=2, guidance="pixel")
    whole, other = (jdm.edit(joint, x, [1], **options).images for x in (images, 255 - images))
    assert (whole == other).mean() > 0.95


def test_an_edit_depends_on_its_image_and_seed_alone(joint, assert_same_images):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    options = dict(strength=0.5, steps=2)
    whole = jdm.edit(joint, images, [1], seeds=[5, 6, 7, 8], **options)
    order = [2, 0, 3, 1]
    other = jdm.edit(joint, images[order], [1], seeds=np.array([5, 6, 7, 8])[order], **options)
    np.testing.assert_array_equal(other.images, whole.images[order])
    floats = jdm.edit(joint, images / 127.5 - 1, [1], seeds=[5, 6, 7, 8], **options)
    assert_same_images(floats.images, whole.images)
    assert whole.settings["strength"] == 0.5 and len(np.unique(whole.images, axis=0)) == 4


def test_an_inversion_takes_as_many_images_at_once_as_memory_holds(joint, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    whole = jdm.invert(joint, images, steps=3, iterations=2)
    assert "at a time" not in capsys.readouterr().err
    program = programs.compile_inverter(
        joint.model, joint.diffusion, Method(guidance="none", steps=3), 2, local_mesh(), 8
    )
    monkeypatch.setattr(programs, "free_memory", lambda device: programs.needed(program) - 1)
    parts = jdm.invert(joint, images, steps=3, iterations=2)
    assert "8 images a device would need" in capsys.readouterr().err
    np.testing.assert_allclose(parts, whole, atol=1e-4 * abs(whole).max())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda j, x: jdm.interpolate(j, (1, 2, 3)), "^seeds are 3; interpolation is between 2"),
        (lambda j, x: jdm.interpolate(j, (1, 2), 1), "^n=1 must be at least 2"),
        (lambda j, x: jdm.interpolate(j, (1, -2)), "^seeds hold -2"),
        (lambda j, x: jdm.interpolate(j, (1, 2), eta=1.0), "^sampler='ddim' draws noise"),
        (
            lambda j, x: jdm.interpolate(j, (1, 2), sampler="ancestral"),
            "^sampler='ancestral' draws noise",
        ),
        (lambda j, x: jdm.interpolate(j, [[1, 2]]), "^seeds must be a list of whole numbers"),
        (lambda j, x: jdm.invert(j, x, iterations=0), "^iterations=0"),
        (lambda j, x: jdm.invert(j, x, steps=51), "^steps=51"),
        (lambda j, x: jdm.invert(j, x[..., :4, :, :]), "^images have the shape"),
        (lambda j, x: jdm.invert(j, x[:0]), "^images are none; there must be at least 1$"),
        (lambda j, x: jdm.edit(j, x[:0], [1]), "^images are none; there must be at least 1$"),
        (
            lambda j, x: jdm.edit(j, x, [1], strength=0.0),
            "^strength=0.0 must be above 0 and at most 1",
        ),
        (lambda j, x: jdm.edit(j, x, [1], strength=1.5), "^strength=1.5"),
        (lambda j, x: jdm.edit(j, x, [1], strength=0.5, steps=26), "^steps=26 .*are left, 25$"),
        (lambda j, x: jdm.edit(j, x, None), "^guidance='representation' needs labels"),
        (lambda j, x: jdm.edit(j, x, [1], guidance=""), "^guidance='' is unknown"),
        (lambda j, x: jdm.edit(j, x.astype(int), [1]), "^images have the dtype int64"),
        (lambda j, x: jdm.edit(j, x * 1.0, [1]), r"^images are floats that range over \[0, 255\]"),
    ],
)
def test_bad_requests_are_one_sentence(joint, call, said):
    images = np.tile(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1) | 3, (2, 1, 1, 1))
    images[0, 0, 0] = 0
    with pytest.raises(ValueError, match=said) as info:
        call(joint, images)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["total", "start", "labels", "step"])
def test_unknown_options_are_refused_as_python_does(joint, name):
    said = f"unexpected keyword argument '{name}'$"
    with pytest.raises(TypeError, match=said):
        jdm.interpolate(joint, (1, 2), **{name: 3})


def test_floats_in_0_to_1_are_warned_about(joint):
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 1))
    with pytest.warns(UserWarning, match=r"taken to lie in \[-1, 1\]"):
        jdm.edit(joint, images, [1], strength=0.5, steps=2)
