"""jdm.diffusion.method, and the records that say which options go with which name."""

import json

import numpy as np
import pytest

from jdm import names
from jdm.diffusion.guidance import GUIDANCE, SCALE_SCHEDULES, chosen
from jdm.diffusion.method import OPTIONS, Method, check_takes, method_of
from jdm.diffusion.process import PREDICTIONS, SCHEDULES, VARIANCES
from jdm.diffusion.samplers import SAMPLERS, SPACINGS, THRESHOLDS
from jdm.errors import InvalidValue
from jdm.options import described, table


@pytest.mark.parametrize(
    "records, known",
    [
        (SCHEDULES, names.SCHEDULES),
        (PREDICTIONS, names.PREDICTIONS),
        (VARIANCES, names.VARIANCES),
        (SAMPLERS, names.SAMPLERS),
        (SPACINGS, names.SPACINGS),
        (THRESHOLDS, names.THRESHOLDS),
        (GUIDANCE, names.GUIDANCE),
        (SCALE_SCHEDULES, names.SCALE_SCHEDULES),
    ],
)
def test_every_name_has_a_record(records, known):
    assert tuple(records) == known


def test_records_take_options_that_exist():
    for name, sampler in SAMPLERS.items():
        assert set(sampler.takes) <= OPTIONS.keys(), name
    for name, guidance in GUIDANCE.items():
        assert set(guidance.takes) <= OPTIONS.keys() | {"labels", "classifier"}, name
        assert (guidance.default_scale > 0) == ("scale" in guidance.takes), name


@pytest.mark.parametrize(
    "options, chooser, sentence",
    [
        (dict(sampler="heun", eta=0.5), "sampler", "eta=0.5 goes with sampler ddim, not 'heun'"),
        (
            dict(guidance="pixel", blocks=("mid",)),
            "guidance",
            "blocks=('mid',) goes with guidance representation or published, not 'pixel'",
        ),
        (
            dict(guidance="none", scale=2.0),
            "guidance",
            "scale=2.0 goes with guidance pixel or representation or published, not 'none'",
        ),
    ],
)
def test_an_option_of_another_sampler_or_guidance_is_refused(options, chooser, sentence):
    records = {"sampler": SAMPLERS, "guidance": GUIDANCE}
    method = chosen(Method(**options), labelled=False)
    with pytest.raises(InvalidValue) as error:
        check_takes(method, chooser, records[chooser])
    assert str(error.value) == sentence and error.value.parameter in options
    (other,) = records.keys() - {chooser}
    check_takes(method, other, records[other])


def test_an_option_of_the_chosen_sampler_or_guidance_is_accepted():
    check_takes(Method(sampler="ddim", eta=0.5), "sampler", SAMPLERS)
    method = Method(guidance="representation", blocks=("mid",), scale=1.0)
    check_takes(method, "guidance", GUIDANCE)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            dict(sampler="euler"),
            "sampler='euler' is unknown; known: ancestral, ddim, dpmpp_2m, heun",
        ),
        (dict(threshold="cut"), "threshold='cut' is unknown; known: none, static, dynamic"),
        (dict(guidance="clip"), "guidance='clip' is unknown; known: none, pixel, representation, "),
        (dict(scale_schedule="up"), "scale_schedule='up' is unknown; known: constant, early, late"),
        (dict(eta=1.5), "eta=1.5 must be between 0 and 1"),
        (dict(eta=True), "eta=True must be a number"),
        (dict(scale=float("nan")), "scale=nan must be finite"),
        (dict(scale=1e39), "scale=1e+39 must be finite as float32"),
        (dict(blocks="mid"), "blocks='mid' must be a list"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_option(options, sentence):
    with pytest.raises(InvalidValue) as error:
        Method(**options)
    assert str(error.value).startswith(sentence)


def test_a_method_is_made_of_another_one_and_of_numpys_numbers():
    method = method_of(Method(steps=7), dict(eta=np.float32(0.5), blocks=["mid", "stem"]))
    assert method == Method(steps=7, eta=0.5, blocks=("mid", "stem"))
    assert method.changed() == {"steps", "eta", "blocks"} and not Method().changed()
    assert json.loads(json.dumps(method.settings())) == method.settings()
    assert type(method_of(None, dict(steps=np.int64(3))).steps) is int
    with pytest.raises(TypeError, match="^unexpected keyword argument 'stepz'$"):
        method_of(None, dict(stepz=3))


def test_every_option_is_in_the_description_and_in_the_table():
    for name in OPTIONS:
        assert f"{name}: " in described(OPTIONS) and f"| `{name}` |" in table(OPTIONS)
