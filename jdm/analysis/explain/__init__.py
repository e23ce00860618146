"""Counterfactual images: what would have to change in an image for another class.

counterfactuals.py: `jdm.explain`. program.py: an image is noised and denoised toward a target, as a
compiled program. search.py: until the class flips. explanations.py: the result. figure.py: its
pictures. What the user may choose is in jdm.analysis.explain_options.
"""

from jdm.analysis.explain.counterfactuals import explain as explain
