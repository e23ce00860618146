"""Real 8×8 digits, the data set that comes with the package.

    jdm train --config=digits --workdir=runs/digits

Minutes on two CPU cores. Should reach what docs/results.md says, measured there with
benchmarks/digits.py: the test accuracy, and how many guided samples show the class they were asked
for. docs/results.md says on what the values were chosen.
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    config.data.batch_size = 32
    config.model.blocks = 1
    # The images are small and clean: x0 is the easier thing to predict, and the cosine schedule
    # spends fewer steps on images that are noise to the eye and to the classifier.
    config.diffusion.update(steps=500, schedule="cosine", prediction="x0")
    config.loss.weight = 0.5
    config.optim.update(lr=2e-3, schedule="cosine", warmup_steps=100, weight_decay=0.01)
    config.train.update(steps=1200, ema_decay=0.995)
    config.eval.every = 400
    config.checkpoint.every = 400
    return config
