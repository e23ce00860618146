"""The TPU chips that `jdm plan` knows, and common slices of them; no JAX."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A chip, from the pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e).

    flops: operations of bfloat16 products a second. memory: bytes. bandwidth: bytes a second to and
    from its memory. network: bytes a second that it sends to other chips (half of what the page
    calls bidirectional). slices: of Cloud TPU.
    """

    flops: float
    memory: int
    bandwidth: float
    network: float
    slices: str


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, _FLAT),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 8x8x8"),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, _FLAT),
}
