"""Tiny networks for the tests of jdm.nn, with weights that are nowhere zero."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jdm.configs import base
from jdm.nn.model import JointModel, example_inputs

SMALL = dict(image_size=8, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(**changes) -> a JointModel of 8×8 images; changes are of its fields."""

    @functools.cache
    def make(**changes) -> JointModel:
        fields = {
            **base.get_config().model,
            "dtype": "float32",
            "attention_implementation": "auto",
            "remat": "none",
        }
        return JointModel(**{**fields, **SMALL, "head_width": 16, **changes})

    return make


def initialise(model: JointModel, key):
    """The parameters as training starts with them."""
    return model.init(key, *example_inputs(model))["params"]


@pytest.fixture(scope="session")
def tiny_params():
    """tiny_params(model) -> random parameters, also where they start as zero.

    Drawn by numpy: compiling the model's own initialisers takes longer than all the rest.
    """

    @functools.cache
    def make(model: JointModel):
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            noise = rng.normal(size=leaf.shape).astype(np.float32)
            if path[-1].key == "kernel":
                return noise / np.sqrt(np.prod(leaf.shape[:-1]))
            return 0.1 * noise + (path[-1].key == "scale")

        shapes = jax.eval_shape(functools.partial(initialise, model), jax.random.key(0))
        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make


@pytest.fixture(scope="session")
def starting_params(tiny_params):
    """starting_params(model) -> the same with zeros where the model starts with zeros."""

    def make(model: JointModel):
        zero = ("conv_out", "project", "out")

        @jax.jit
        def init(key):  # the draws of the others are compiled away
            flat = flatten_dict(initialise(model, key)["unet"])
            return {path: leaf for path, leaf in flat.items() if path[-2] in zero}

        params = tiny_params(model)
        unet = {**flatten_dict(params["unet"]), **init(jax.random.key(0))}
        return {**params, "unet": unflatten_dict(unet)}

    return make


@pytest.fixture(scope="session")
def apply():
    """apply(model, params, method, *args) -> what the method returns, compiled whole."""

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def run(model, params, method, *args):
        return model.apply({"params": params}, *args, method=method)

    return run
