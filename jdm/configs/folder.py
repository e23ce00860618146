"""Your own folder of images, a sub-folder for each class: colour, 32×32 pixels, a laptop's network.

    jdm train --config=folder --config.data.name=folder:pictures --workdir=runs/pictures \\
        --config.model.num_classes=2

96,000 images, of which this network trains 145 a second on two quiet CPU cores (it is that of
benchmarks/cells_config.py, trained half as long, for hundreds of images). What it reaches was not
measured; docs/own-images.md says what to change for more images, larger ones and grey ones.
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    config.data.update(name="folder:pictures", batch_size=32, validation=0.1)
    config.model.update(image_size=32, image_channels=3, num_classes=2)
    config.model.update(channels=16, multipliers=(1, 2, 4), blocks=1, attention=(8,))
    config.diffusion.update(steps=500, schedule="cosine", prediction="v")
    config.loss.update(classify="noised", weight=0.3)
    config.optim.update(lr=1e-3, schedule="cosine", warmup_steps=100, weight_decay=0.01)
    config.train.update(steps=3000, ema_decay=0.998)
    config.eval.every = 500
    config.checkpoint.every = 500
    return config
