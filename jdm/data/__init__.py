"""Data sets: splits of uint8 images with labels, and batches whose position can be saved."""

from jdm.errors import Failure


class DataError(Failure):
    """Data that is missing or cannot be read."""
