"""Fashion-MNIST as published: 100,000 steps of 128. jdm.configs.reference says what is shared.

    jdm train --config=reference/fashion_mnist --workdir=runs/fashion_mnist

8,799,105 + 915,276 parameters (network and head). Of the published commands, this is the one
that names Fashion-MNIST as its data; it stands under the heading CelebA. What it should reach, and
in how many hours: not measured here.
"""

from jdm.configs import reference


def get_config():
    config = reference.get_config()
    config.data.name = "fashion_mnist"
    config.data.batch_size = 128
    config.model.update(image_size=28, image_channels=1, num_classes=10)
    # Attention at "16,8" at 28 pixels means all 784 positions of the first level, and no other.
    config.model.update(channels=64, multipliers=(1, 2, 2), attention=(28,))
    config.diffusion.steps = 500
    config.train.steps = 100_000
    return config
