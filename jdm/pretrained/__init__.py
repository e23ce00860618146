"""The models that come with the package, and their names, which jdm.load takes.

Each is a work folder with one checkpoint: weights in half precision, and the config.
benchmarks/pretrained.py trains and exports them. Imports no JAX, since the help of the commands
lists the names.
"""

from pathlib import Path

PRETRAINED = {"digits": Path(__file__).with_name("digits")}
