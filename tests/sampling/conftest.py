"""A tiny model that every test of sampling shares, with the programs compiled for it."""

import pytest

import jdm


@pytest.fixture(scope="session")
def joint(tiny) -> jdm.Joint:
    return jdm.load(tiny)
