"""`jdm.sample`: images of a trained model, one per seed."""

import os
from typing import Any

import numpy as np

from jdm.diffusion.method import OPTIONS, Method, method_of
from jdm.joint import Joint, as_joint, check_noise, name_of
from jdm.numerics import fixed_flags
from jdm.options import takes
from jdm.sampling.generate import generate
from jdm.sampling.labels import Numbers
from jdm.sampling.request import check_request, from_noise
from jdm.sampling.samples import Samples


@takes(OPTIONS, described_here=OPTIONS)
@fixed_flags()
def sample(
    joint: Joint | str | os.PathLike,
    n: int | None = None,
    *,
    labels: Numbers | None = None,
    seeds: Numbers | None = None,
    method: Method | None = None,
    classifier: Joint | str | os.PathLike | None = None,
    noise: np.ndarray | None = None,
    trajectory: bool = False,
    batch_size: int | None = None,
    **options: Any,
) -> Samples:
    """Images of a trained model, one per seed.

    joint: a Joint, or a path that `jdm.load` takes. n: the number of images N; None is the number
    of seeds, or else of labels, or else 1.
    labels: the targets of guidance, one for each image or one for all: classes in [0, K), with None
    or -1 for an image without guidance; or probabilities [N, K] whose rows sum to 1. For a
    multi-label model attributes [N, K]: 1 (on), 0 (off) or -1 (not guided).
    seeds: integers in [0, 2**32); None is 0 to N - 1. noise: x_T, finite floats [N, H, W, C], to
    start from instead of noise drawn from the seeds; noise of later steps is still drawn from them,
    by a sampler that draws noise. With `noise` the default sampler is ddim, which draws none.
    classifier: the guidance classifier: a model trained on the same noise levels; None is the
    joint's own. trajectory: whether the estimates of x0 at every step are kept.
    batch_size: the most images per device and call. Batches are smaller where memory requires it.
    method: a Method. Its options can also be given as arguments, which take precedence:

    OPTIONS

    Raises InvalidValue (a ValueError), naming the argument, for a value that is not allowed;
    MemoryError where not even one image for each device fits; FloatingPointError where an image is
    not finite, which too large a scale can cause.
    """
    path, joint = name_of(joint), as_joint(joint)
    if noise is not None:
        noise = np.asarray(check_noise(joint, "noise", noise))
        n = len(noise) if n is None else n
    method = method_of(method, options)
    request = check_request(
        joint,
        n,
        labels=labels,
        seeds=seeds,
        method=method if noise is None else from_noise(method),
        classifier=classifier,
        trajectory=trajectory,
        batch_size=batch_size,
    )
    if noise is not None:
        request = request.starting("noise", noise)
    return generate(joint, request, batch_size, model=path)
