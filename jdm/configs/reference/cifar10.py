"""CIFAR-10 as published: 500,000 steps of 256. jdm.configs.reference says what the recipes share.

    jdm train --config=reference/cifar10 --workdir=runs/cifar10

52,542,979 + 6,922,892 parameters (network and head). What it should reach, and in how many hours:
not measured here.
"""

from jdm.configs import reference


def get_config():
    return reference.at_32_pixels("cifar10", num_classes=10)
