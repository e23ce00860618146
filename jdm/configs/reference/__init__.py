"""The published recipes (Deja et al. 2023, arXiv:2301.13622), to the letter; what they share.

AdamW 1e-4, constant, no decay, no clipping; dropout 0.3; the published linear schedule, noise
predicted, fixed large variance; cross-entropy of clean images, augmented as published, at
lambda 0.001, by the published head; a moving average of 0.9999 from the first step. Batches of
256 for 500,000 steps, unless a recipe says otherwise. All of the training split, evaluated on
the test split, and so no estimate of how a choice made by it would do.
"""

from ml_collections import ConfigDict

from jdm.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.batch_size = 256
    # All of train is trained on, and the test split looked at meanwhile.
    config.data.validation = 0.0
    config.eval.split = "test"
    config.model.update(channels=128, blocks=3, heads=4, dropout=0.3)
    config.model.update(head="published", head_time="raw", head_dropout=0.7)
    config.diffusion.update(steps=1000, schedule="linear", prediction="eps", variance="fixed_large")
    config.loss.update(weight=0.001, classify="clean", augment="published", min_snr_gamma=0.0)
    config.optim.update(
        lr=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0
    )
    config.train.update(steps=500_000, ema_decay=0.9999, ema_warmup=False)
    config.eval.every = 10_000
    config.checkpoint.every = 20_000
    return config


def at_32_pixels(name: str, num_classes: int) -> ConfigDict:
    """The network of 32×32 colour images. Attention at "16,8" means at these side lengths here."""
    config = get_config()
    config.data.name = name
    config.model.update(image_size=32, image_channels=3, num_classes=num_classes)
    config.model.update(multipliers=(1, 2, 2, 2), attention=(16, 8))
    return config


def at_64_pixels(name: str, num_classes: int) -> ConfigDict:
    """The narrower network of 64×64 colour images, T = 500, 100,000 steps of 128."""
    config = get_config()
    config.data.name = name
    config.data.batch_size = 128
    config.model.update(image_size=64, image_channels=3, num_classes=num_classes)
    config.model.update(channels=64, multipliers=(1, 2, 3, 4), attention=(16, 8))
    config.diffusion.steps = 500
    config.train.steps = 100_000
    return config
