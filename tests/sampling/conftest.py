"""A tiny model that every test of sampling shares, with the programs compiled for it."""

import numpy as np
import pytest

import jdm


@pytest.fixture(scope="session")
def joint(tiny) -> jdm.Joint:
    return jdm.load(tiny)


@pytest.fixture(scope="session")
def assert_same_images():
    """The same, as far as floats summed in another order are: one level on 0.1 % of pixels."""

    def check(a, b):
        difference = np.abs(a.astype(int) - b.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.001

    return check
