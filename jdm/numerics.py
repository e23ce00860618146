"""The same numbers under every global flag of JAX.

Some flags of JAX change which random numbers a key stands for, the dtype of arrays, or the
precision of a product. A script sets them for its own code. So that a seed stands for one image,
and a config for one training run, jdm traces and compiles its programs with these flags at fixed
values, and makes its keys in a way that no flag changes. The precision of a model's computation is
a setting of the model, config.exec.dtype.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

PRNG = "threefry2x32"

# The context manager of each flag that changes numbers -> its value in jdm, which is JAX's default.
FLAGS: dict[Any, Any] = {
    jax.enable_x64: False,
    jax.threefry_partitionable: True,  # read when a program is compiled, not where it draws
    jax.default_prng_impl: PRNG,
    jax.default_matmul_precision: None,
    jax.numpy_dtype_promotion: "standard",
    jax.numpy_rank_promotion: "allow",
}


@contextlib.contextmanager
def fixed_flags() -> Iterator[None]:
    """FLAGS, whatever the caller has set. Also a decorator: `@fixed_flags()`.

    Every public function that traces, compiles or computes with JAX has it.
    """
    with contextlib.ExitStack() as stack:
        for flag, value in FLAGS.items():
            stack.enter_context(flag(value))
        yield


def key_of(seed: Any) -> Key[Array, "..."]:
    """The keys of seeds in [0, 2**32), of any shape: those of jax.random.key without any flag."""
    low = jnp.asarray(seed, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(low), low], axis=-1), impl=PRNG)
