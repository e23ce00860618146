"""Samplers of t: they draw the noise levels of a batch, and give each row an importance weight.

(10c)  p_t is proportional to sqrt(E[L_t²]) over the last ten losses at t. A row's weight is
       1 / (p_t T), so the expected loss is that of uniform draws. One draw in 1000 is uniform, and
       all are until every t has ten losses.      Nichol & Dhariwal 2021, section 3.3
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jdm import names
from jdm.arrays import Times
from jdm.training.terms.base import PerRow

KEPT = 10  # the number of losses that are kept at each t
UNIFORM = 0.001  # the share of uniform draws


class TSampler(NamedTuple):
    """Three pure functions. A history is a pytree of arrays, or None.

    init: () -> history. draw: (key, history, B) -> (t int32 [B] in [0, T), importance weights
    float32 [B], 1 on average). update: (history, t [B], {term: values [B]}) -> history. term: the
    name of the term of the loss whose values the history keeps; None if it keeps none.
    """

    init: Callable[[], Any]
    draw: Callable[..., tuple[Times, PerRow]]
    update: Callable[..., Any]
    term: str | None = None


class History(NamedTuple):
    """The last losses at each t, and the number of losses so far at each t."""

    losses: Float[Array, "t kept"]  # a ring buffer for each t
    seen: Int[Array, " t"]


def uniform(steps: int) -> TSampler:
    """Every t is equally likely."""

    def draw(key: Key[Array, ""], history: None, rows: int):
        return jax.random.randint(key, (rows,), 0, steps, jnp.int32), jnp.ones(rows, jnp.float32)

    return TSampler(lambda: None, draw, lambda history, t, values: history)


def loss_second_moment(steps: int) -> TSampler:
    """(10c): noise levels with large losses are drawn more often, with less weight."""
    term = "diffusion"

    def init():
        return History(jnp.zeros((steps, KEPT), jnp.float32), jnp.zeros(steps, jnp.int32))

    def draw(key: Key[Array, ""], history: History, rows: int):
        root = jnp.sqrt((history.losses**2).mean(axis=1))
        p = (1 - UNIFORM) * root / root.sum() + UNIFORM / steps
        p = jnp.where((history.seen >= KEPT).all(), p, 1 / steps)
        t = jax.random.choice(key, jnp.arange(steps, dtype=jnp.int32), (rows,), p=p)
        return t, 1 / (steps * p[t])

    def update(history: History, t: Times, values: dict[str, PerRow]):
        # After sorting by t, rows with the same t take consecutive slots of its ring buffer.
        order = jnp.argsort(t, stable=True)
        t, losses = t[order], values[term][order]
        first, end = (jnp.searchsorted(t, t, side=side) for side in ("left", "right"))
        place = jnp.arange(len(t), dtype=jnp.int32)
        slot = (history.seen[t] + place - first) % KEPT
        # Only the last KEPT rows with the same t are written, so that no slot is written twice.
        row = jnp.where(place >= end - KEPT, t, steps)
        kept = history.losses.at[row, slot].set(losses, mode="drop")
        return History(kept, history.seen.at[t].add(1))

    return TSampler(init, draw, update, term)


T_SAMPLERS: dict[str, Callable[[int], TSampler]] = names.T_SAMPLERS.records(
    {"uniform": uniform, "loss_second_moment": loss_second_moment}
)
