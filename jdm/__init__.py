"""jdm: joint diffusion models. One network that generates, classifies and explains.

    import jdm
    joint = jdm.load("digits")  # or a work folder: "runs/digits"
    samples = jdm.sample(joint, labels=[3, 3, 5], seeds=range(3))
    jdm.classify(joint, samples.images)

A name is imported when it is first used, so that `import jdm` takes no time.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Joint": "jdm.joint",
    "classify": "jdm.joint",
    "load": "jdm.joint",
    "Method": "jdm.diffusion.method",
    "Samples": "jdm.sampling.samples",
    "sample": "jdm.sampling.sample",
    "edit": "jdm.sampling.editing",
    "interpolate": "jdm.sampling.editing",
    "invert": "jdm.sampling.editing",
    "features": "jdm.analysis.features",
    "explain": "jdm.analysis.explain",
}
__all__ = list(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jdm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
