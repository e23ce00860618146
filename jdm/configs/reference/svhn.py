"""SVHN as published: 250,000 steps of 256. jdm.configs.reference says what the recipes share.

    jdm train --config=reference/svhn --workdir=runs/svhn

52,542,979 + 6,922,892 parameters (network and head). What it should reach, and in how many hours:
not measured here.
"""

from jdm.configs import reference


def get_config():
    config = reference.at_32_pixels("svhn_cropped", num_classes=10)
    config.train.steps = 250_000
    return config
