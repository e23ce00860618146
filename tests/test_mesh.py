"""What is computed row by row, in batches of one shape; on eight devices: sampling/test_sample."""

import jax
import numpy as np
import pytest

from jdm.errors import InvalidValue
from jdm.mesh import in_batches, local_mesh, replicated


@pytest.mark.parametrize("weights", [None, np.ones(2)])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 3), (6, 3), (2, 5)])
def test_each_row_is_computed_once_in_order_and_in_one_shape(rows, size, weights):
    if weights is not None:
        weights = jax.device_put({"w": weights}, replicated(local_mesh()))
    x, index = np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2), np.arange(rows)
    shapes, done = [], []

    def function(given, x, index):
        assert given is weights or given["w"] is weights["w"]
        assert isinstance(x, np.ndarray) == (weights is None)
        shapes.append((x.shape, index.shape))
        return {"twice": 2 * x}, index

    twice, found = in_batches(function, weights, [x, index], size, done.append)
    np.testing.assert_array_equal(twice["twice"], 2 * x)
    np.testing.assert_array_equal(found, index)
    assert set(shapes) == {((size, 2), (size,))}
    assert sum(done) == rows and max(done) <= size


def test_of_no_rows_there_are_none_of_the_same_shape():
    none = np.zeros((0, 4, 4, 1), np.uint8)
    (found,) = in_batches(lambda _, x: (x.mean(axis=(2, 3)),), None, [none], 3)
    assert found.shape == (0, 4) and found.dtype == np.float32


@pytest.mark.parametrize(
    "devices", [[], "cpu", 1, jax.devices()[0].id, [jax.devices()[0], jax.devices()[0]], [None]]
)
def test_devices_that_cannot_be_used_are_refused(devices):
    with pytest.raises(InvalidValue, match="devices=.* must be one or more different devices"):
        local_mesh(devices)
