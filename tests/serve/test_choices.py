"""What can be chosen comes from the declarations, and leads to the labels of jdm.sample."""

import numpy as np
import pytest

from jdm import names
from jdm.config import load_config
from jdm.diffusion.guidance import GUIDANCE
from jdm.diffusion.process import Diffusion
from jdm.errors import InvalidValue
from jdm.joint import Joint
from jdm.nn.model import make_model
from jdm.sampling.labels import parse_numbers
from jdm.serve import choices


def model(multi_label=False, has_classifier=True, class_names=("cat", "dog", "cow")) -> Joint:
    """A model of three classes without weights."""
    config = load_config("tiny", ["--config.model.num_classes=3"])
    config.model.multi_label = multi_label
    config.loss.terms = ("diffusion", "classifier") if has_classifier else ("diffusion",)
    network = make_model(config.model, config.exec)
    return Joint(config, network, Diffusion(100), {}, {"class_names": class_names})


def test_every_guidance_that_the_model_can_have_is_offered():
    assert choices.guidances(model()) == list(names.GUIDANCE)
    assert choices.guidances(model(has_classifier=False)) == ["none"]
    for name in names.GUIDANCE:
        sampler, steps, scale = choices.defaults(model(), name)
        assert (sampler, steps, scale) == (
            GUIDANCE[name].sampler,
            GUIDANCE[name].steps,
            GUIDANCE[name].default_scale,
        )


def test_labels_of_classes():
    one = model()
    assert choices.labels(one, 2, [], 2) == [2, 2]
    assert choices.labels(one, choices.EVERY, [], 4) == [0, 1, 2, 0]
    assert choices.labels(one, choices.NO_CLASS, [], 4) is None
    assert [name for name, _ in choices.classes(one)][:3] == ["cat", "dog", "cow"]
    assert choices.class_names(model(class_names=()))[1] == "class 1"


def test_labels_of_attributes():
    one = model(multi_label=True)
    np.testing.assert_array_equal(choices.labels(one, [0], [2], 2), [[1, -1, 0]] * 2)
    assert choices.labels(one, [], [], 2) is None
    with pytest.raises(InvalidValue, match="dog.*cannot be both on and off"):
        choices.labels(one, [1], [1], 1)
    with pytest.raises(InvalidValue, match="target is not chosen"):
        choices.target(one, [], [])


def test_a_range_of_seeds_is_counted_before_it_is_made():
    assert parse_numbers("seeds", "0-15", 16) == list(range(16))
    for text in ("0-16", "0-4294967295", "0-7,0-8"):
        with pytest.raises(InvalidValue, match="at most 16 are allowed"):
            parse_numbers("seeds", text, 16)
