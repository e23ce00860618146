"""jdm.training.warm: what is taken over from another run, and what may be new."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jdm.training.step import TrainState
from jdm.training.warm import new_arrays, warm_started


def weights(value: float, classes: int = 3, width: int = 4, stats: bool = True):
    def array(*shape):
        return jnp.full(shape, value, jnp.float32)

    return {
        "params": {
            "unet": {"stem": {"kernel": array(2, width)}},
            "head": {"in": {"kernel": array(4, 2)}, "out": {"kernel": array(2, classes)}},
        },
        "batch_stats": {"head": {"norm": {"mean": array(4)}}} if stats else {},
    }


def state_of(weights) -> TrainState:
    return TrainState(jnp.int32(0), **weights, ema=weights, optimiser={"mu": jnp.zeros(3)})


def test_where_all_fits_all_is_taken_over_and_the_optimiser_is_left():
    ours, saved = weights(0.0), weights(1.0)
    assert new_arrays(ours, saved) == []
    state = warm_started(state_of(ours), saved)
    taken = {"params": state.params, "batch_stats": state.batch_stats}
    chex.assert_trees_all_equal(taken, state.ema, saved)
    for collection in ("params", "batch_stats"):  # a step donates both
        ours, copies = (jax.tree.leaves(tree[collection]) for tree in (taken, state.ema))
        assert all(a is not b for a, b in zip(ours, copies, strict=True))
    assert (state.optimiser["mu"] == 0).all()


def test_other_classes_are_a_new_last_layer_and_nothing_else():
    ours, saved = weights(0.0, classes=5), weights(1.0)
    assert new_arrays(ours, saved) == ["head/out/kernel"]
    state = warm_started(state_of(ours), saved)
    head = state.params["head"]
    assert head["out"]["kernel"].shape == (2, 5) and (head["out"]["kernel"] == 0).all()
    assert (head["in"]["kernel"] == 1).all() and (state.params["unet"]["stem"]["kernel"] == 1).all()
    chex.assert_trees_all_equal(state.ema["params"], state.params)


@pytest.mark.parametrize(
    "ours, theirs, new", [(True, False, ["head/norm/mean"]), (False, True, [])]
)
def test_heads_may_keep_statistics_or_not(ours, theirs, new):
    mine, saved = weights(0.0, stats=ours), weights(1.0, stats=theirs)
    assert new_arrays(mine, saved) == new
    state = warm_started(state_of(mine), saved)
    chex.assert_trees_all_equal(state.batch_stats, mine["batch_stats"])


def test_another_network_is_one_sentence_with_its_first_difference():
    message = (
        r"^config\.train\.init_from has another network: unet/stem/kernel is float32\[2, 4\] "
        r"there and float32\[2, 8\] here$"
    )
    with pytest.raises(ValueError, match=message):
        new_arrays(weights(0.0, width=8), weights(1.0))
    saved = weights(1.0)
    saved["params"]["unet"]["time"] = saved["params"]["unet"]["extra"] = {"bias": jnp.zeros(1)}
    message = r"unet/extra/bias is float32\[1\] there and nothing here; 1 more differ$"
    with pytest.raises(ValueError, match=message):
        new_arrays(weights(0.0), saved)
