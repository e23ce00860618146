"""MNIST at its own 28×28 pixels, by a network small enough for a laptop.

    jdm train --config=mnist --workdir=runs/mnist

192,000 images, at best 190 of them a second on two CPU cores. What it reaches on MNIST was not
measured; on Fashion-MNIST (benchmarks/fashion.py, --config.data.name=folder:fashion) it is in
docs/results.md.
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    config.data.update(name="mnist", batch_size=32)
    config.model.update(image_size=28, channels=16, multipliers=(1, 2, 4), blocks=1, attention=(7,))
    # As for the smaller digits: x0 is the easier thing to predict of images that are nearly
    # black and white, and the cosine schedule spends fewer steps on pure noise.
    config.diffusion.update(steps=500, schedule="cosine", prediction="x0")
    # Guidance asks about noised images; leaving the clean ones out saves an encoder pass.
    config.loss.update(classify="noised", weight=0.3)
    config.optim.update(lr=1.5e-3, schedule="cosine", warmup_steps=200, weight_decay=0.01)
    config.train.update(steps=6000, ema_decay=0.998)
    config.checkpoint.every = 500
    return config
