"""Blood cells at 32×32 pixels, and a start for other colour images: a network for a laptop.

    python benchmarks/cells.py --tar=blood-cells.tar --out=cells && jdm data prepare folder:cells
    jdm train --config=benchmarks/cells_config.py --workdir=runs/cells

576,000 images, 110 of them a second on two CPU cores. What it reaches is in docs/explain.md.
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    config.data.update(name="folder:cells", batch_size=32)
    config.model.update(image_size=32, image_channels=3, num_classes=3)
    config.model.update(channels=16, multipliers=(1, 2, 4), blocks=1, attention=(8,))
    config.diffusion.update(steps=500, schedule="cosine", prediction="v")
    config.loss.update(classify="noised", weight=0.3)
    config.optim.update(lr=1e-3, schedule="cosine", warmup_steps=200, weight_decay=0.01)
    config.train.update(steps=18_000, ema_decay=0.998)
    config.eval.every = 1000
    config.checkpoint.every = 500
    return config
