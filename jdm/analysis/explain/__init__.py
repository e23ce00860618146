"""Counterfactual images: what would have to change in an image for another class.

counterfactuals.py: `jdm.explain`. options.py: what the user may choose. program.py: an image is
noised and denoised toward a target, as a compiled program. search.py: until the class flips.
explanations.py: the result. figure.py: its pictures.
"""

from jdm.analysis.explain.counterfactuals import explain as explain
