"""The models that come with the package.

Owns where they are. Each is a work folder with one checkpoint, of weights in half precision and
config alone, made by benchmarks/pretrained.py. jdm.load takes their names. Imports no JAX: the
names stand in the help of the commands.
"""

from pathlib import Path

PRETRAINED = {"digits": Path(__file__).with_name("digits")}
