"""How the noise levels of a batch are drawn, and what each row counts for it.

Owns the distribution over t and what it remembers of past losses. Does not know what a loss is.

(10c)  loss_second_moment   p_t proportional to sqrt(E[L_t²]) over the last ten losses at t, mixed
                            with a share of 0.001 of uniform draws; a row counts 1 / (p_t T), so
                            that the expected loss is that of uniform draws. Until every t has ten
                            losses, draws are uniform.     Nichol & Dhariwal 2021, section 3.3
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

KEPT = 10  # losses that are remembered at each t
UNIFORM = 0.001  # share of the draws that are uniform


class TSampler(NamedTuple):
    """Three pure functions; a history is a pytree of arrays, None where nothing is remembered.

    init: () -> history. draw: (key, history, B) -> (t int32 [B] in [0, T), what each row counts,
    float32 [B], 1 on average). update: (history, t [B], losses [B]) -> history.
    """

    init: Callable[[], Any]
    draw: Callable[..., tuple[Int[Array, " b"], Float[Array, " b"]]]
    update: Callable[..., Any]


class History(NamedTuple):
    """The last losses at each t. losses: a ring [T, KEPT]. seen: how many there were, int32 [T]."""

    losses: Float[Array, "t kept"]
    seen: Int[Array, " t"]


def uniform(steps: int) -> TSampler:
    """Every t alike."""

    def draw(key: Key[Array, ""], history: None, rows: int):
        return jax.random.randint(key, (rows,), 0, steps), jnp.ones(rows)

    return TSampler(lambda: None, draw, lambda history, t, losses: history)


def loss_second_moment(steps: int) -> TSampler:
    """(10c): noise levels where the loss is large or uneven come more often, and count less."""

    def init():
        return History(jnp.zeros((steps, KEPT)), jnp.zeros(steps, jnp.int32))

    def draw(key: Key[Array, ""], history: History, rows: int):
        spread = jnp.sqrt((history.losses**2).mean(axis=1))
        p = (1 - UNIFORM) * spread / spread.sum() + UNIFORM / steps
        p = jnp.where((history.seen >= KEPT).all(), p, 1 / steps)
        t = jax.random.choice(key, steps, (rows,), p=p)
        return t, 1 / (steps * p[t])

    def update(history: History, t: Int[Array, " b"], losses: Float[Array, " b"]):
        # Rows of one t, in their order, go to slots of the ring that follow each other.
        order = jnp.argsort(t, stable=True)
        t, losses = t[order], losses[order]
        first, end = (jnp.searchsorted(t, t, side=side) for side in ("left", "right"))
        place = jnp.arange(len(t))
        slot = (history.seen[t] + place - first) % KEPT
        # Of more than ten rows of one t only the last ten are written: no slot twice.
        row = jnp.where(place >= end - KEPT, t, steps)
        return History(
            history.losses.at[row, slot].set(losses, mode="drop"), history.seen.at[t].add(1)
        )

    return TSampler(init, draw, update)


T_SAMPLERS: dict[str, Callable[[int], TSampler]] = {
    "uniform": uniform,
    "loss_second_moment": loss_second_moment,
}
