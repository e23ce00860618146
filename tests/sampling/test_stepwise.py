"""sample_stepwise: the images of jdm.sample, shown while they are made."""

import numpy as np
import pytest

import jdm
from jdm.errors import InvalidValue
from jdm.sampling.stepwise import sample_stepwise


@pytest.mark.parametrize(
    ("sampler", "guidance", "spacing"),
    [("ancestral", "pixel", "uniform"), ("heun", "none", "quadratic")],
)
def test_the_last_images_are_those_of_sample(joint, sampler, guidance, spacing):
    given = dict(seeds=[3, 1, 4], steps=3, sampler=sampler, guidance=guidance, spacing=spacing)
    if guidance != "none":
        given |= dict(labels=[0, None, 2], scale=2.0)
    *before, last = sample_stepwise(joint, **given)
    whole = jdm.sample(joint, **given, trajectory=True)
    np.testing.assert_array_equal(last.images, whole.images)
    np.testing.assert_array_equal(last.trajectory, whole.trajectory)
    np.testing.assert_array_equal(last.images, jdm.sample(joint, **given).images)
    assert last.settings | {"model": None} == whole.settings | {"model": None}
    if guidance == "none":
        assert last.probabilities is None
    else:
        np.testing.assert_allclose(last.probabilities, whole.probabilities, rtol=1e-5)
    assert len(before) == 2
    for step, samples in enumerate(before):
        np.testing.assert_array_equal(samples.images, whole.trajectory[step])


def test_one_program_serves_any_number_of_steps_and_batch(joint, assert_same_images):
    from jdm.sampling import stepwise

    given = dict(seeds=range(3), sampler="ddim", batch_size=2)
    list(sample_stepwise(joint, steps=2, **given))
    compiled = stepwise._compiled.cache_info().misses
    *_, last = sample_stepwise(joint, steps=5, **given)
    assert stepwise._compiled.cache_info().misses == compiled
    assert_same_images(last.images, jdm.sample(joint, steps=5, **given).images)
    assert last.trajectory.shape[:2] == (5, 3)


def test_wrong_arguments_are_refused_at_the_call(joint):
    with pytest.raises(InvalidValue, match="steps"):
        sample_stepwise(joint, steps=0)
