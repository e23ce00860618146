"""CelebA, 40 attributes, as published: 100,000 steps of 128. jdm.configs.reference: what is shared.

    jdm train --config=reference/celeba --workdir=runs/celeba

The published command under the heading CelebA names Fashion-MNIST as its data; its other values
are taken as they stand, and the image size is that of the published data loader.
30,301,763 + 3,505,706 parameters (network and head). What it should reach, and in how many hours:
not measured here.
"""

from jdm.configs import reference


def get_config():
    config = reference.at_64_pixels("celeb_a", num_classes=40)
    config.model.multi_label = True
    return config
