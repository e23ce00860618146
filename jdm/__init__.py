"""jdm: joint diffusion models. One network that generates, classifies and explains.

    import jdm
    joint = jdm.load("digits")  # or a work folder: "runs/digits"
    samples = jdm.sample(joint, labels=[3, 3, 5], seeds=range(3), guidance="representation")
    jdm.classify(joint, samples.images)

The names are imported when they are first used, so that `import jdm` takes no time.
"""

import importlib

_HOMES = {
    "load": "jdm.joint",
    "classify": "jdm.joint",
    "Joint": "jdm.joint",
    "edit": "jdm.sampling",
    "interpolate": "jdm.sampling",
    "invert": "jdm.sampling",
    "sample": "jdm.sampling",
    "Samples": "jdm.sampling",
}
__all__ = ["Joint", "Samples", "classify", "edit", "interpolate", "invert", "load", "sample"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'jdm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
