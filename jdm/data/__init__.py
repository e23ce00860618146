"""Images in: named splits of uint8 arrays, and checkpointable batches of them."""


class DataError(RuntimeError):
    """Data that is not there or cannot be read; the message is one sentence."""
