"""(14b): the mean of pixel guidance (14) and representation guidance (14a)."""

import functools

from jdm.diffusion.guidance.representation import GUIDANCE as REPRESENTATION

GUIDANCE = REPRESENTATION._replace(make=functools.partial(REPRESENTATION.make, pixel_share=0.5))
