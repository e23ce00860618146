"""MNIST at its own 28×28 pixels, by a network small enough for a laptop.

    jdm train --config=mnist --workdir=runs/mnist

An hour or two on two CPU cores. docs/results.md says what it reached on 4,000 of the digits
(benchmarks/mnist5k.py); on all 60,000 it was not measured.
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    config.data.name = "mnist"
    config.data.batch_size = 32
    config.model.image_size = 28
    config.model.channels = 16
    config.model.multipliers = (1, 2, 4)
    config.model.blocks = 1
    config.model.attention = (7,)
    # As for the smaller digits: x0 is the easier thing to predict of images that are nearly
    # black and white, and the cosine schedule spends fewer steps on pure noise.
    config.diffusion.steps = 500
    config.diffusion.schedule = "cosine"
    config.diffusion.prediction = "x0"
    # Guidance asks about noised images; leaving the clean ones out saves an encoder pass.
    config.loss.classify = "noised"
    config.loss.weight = 0.3
    config.optim.lr = 1.5e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 200
    config.optim.weight_decay = 0.01
    config.train.steps = 6000
    config.train.ema_decay = 0.998
    config.log.every = 100
    config.eval.every = 1000
    config.checkpoint.every = 500
    return config
