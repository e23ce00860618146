"""The smallest network that goes through every line: for tests, and to see that all is in place.

    jdm train --config=tiny --workdir=runs/tiny

Seconds on a CPU; it learns nothing worth looking at.
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    config.data.batch_size = 16
    config.model.update(channels=8, blocks=1, heads=2, head_width=16)
    config.diffusion.steps = 50
    config.optim.lr = 1e-3
    config.train.steps = 4
    config.log.every = 1
    config.eval.every = 2
    config.checkpoint.every = 2
    return config
