"""Malaria cells, parasitised or not, with the recipe of CelebA: no command was published for them.

    jdm train --config=reference/malaria --workdir=runs/malaria

Known of the published runs: colour images of 64×64, two classes (here 0 is parasitised, as in
TFDS), and an accuracy of 98 % in the paper; on which split, after how many steps and with which
values is not known. The split here is of our own.
30,301,763 + 3,455,812 parameters (network and head). What it should reach, and in how many hours:
not measured here.
"""

from jdm.configs import reference


def get_config():
    return reference.at_64_pixels("malaria", num_classes=2)
