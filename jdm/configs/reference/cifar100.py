"""CIFAR-100 as published: 500,000 steps of 256. jdm.configs.reference says what the recipes share.

    jdm train --config=reference/cifar100 --workdir=runs/cifar100

52,542,979 + 7,090,022 parameters (network and head). What it should reach, and in how many hours:
not measured here.
"""

from jdm.configs import reference


def get_config():
    return reference.at_32_pixels("cifar100", num_classes=100)
