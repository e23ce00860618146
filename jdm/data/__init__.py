"""Images in: named splits of uint8 arrays, and checkpointable batches of them."""
