"""Real 8×8 digits: the data set that comes with the package.

jdm train --config=digits --workdir=runs/digits
"""

from jdm.configs import base


def get_config():
    config = base.get_config()
    return config
