"""The array types that several rooms share. The tests check shapes at run time."""

from jaxtyping import Array, Float, Int

Images = Float[Array, "b h w c"]  # in [-1, 1] plus noise
Times = Int[Array, " b"]  # noise levels, int32 in [0, T), 0 = least noisy
