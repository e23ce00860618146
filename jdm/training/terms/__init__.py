"""The terms of the joint loss: a file for each, to be read beside its equations."""

from jdm import names

TERMS = names.TERMS.modules(__name__, "TERM")
