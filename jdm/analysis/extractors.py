"""Features that distances between sets of images are measured in, by name.

    reference   hidden units of the reference classifier, see jdm.analysis.reference
    joint       a representation of the model itself, at t = 0
    inception   the 2048 features of InceptionV3, as of every published FID (the extra `fid`)

Distances in other features are other numbers. The identity of the features is stored beside them.
"""

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jdm import distributed, names
from jdm.analysis.features import features, widths
from jdm.analysis.metrics import Pixels
from jdm.analysis.reference import Reference, of_images
from jdm.analysis.shares import in_shares
from jdm.errors import NO_VALUE, Failure, InvalidValue
from jdm.files import local_path, whole_folder
from jdm.joint import Joint, digest

# The middle of the UNet is its deepest representation, and has few columns: a covariance of D
# columns needs more than D images. At t = 0 images have no noise, so features have none either.
JOINT_T, JOINT_BLOCKS = 0, ("mid",)

INCEPTION = "JDM_INCEPTION"  # the environment variable with the path of its weights
INCEPTION_BATCH = 50  # images of 299×299 pixels: about a gigabyte of activations
OTHERS = "features 'reference' and 'joint' need neither"


class Extractor(NamedTuple):
    """Features of images.

    name: of EXTRACTORS. digest: of the weights that they are computed with. dimension: D. extract:
    a function from uint8 images [N, H, W, C] to float32 [N, D]. kept: whether the features of real
    images are worth keeping on disk: those of the model change with every step of its training.
    """

    name: str
    digest: str
    dimension: int
    extract: Callable[[Pixels], Float[np.ndarray, "n d"]]
    kept: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """{"name", "digest", "dimension"}; where it is equal, distances can be compared."""
        return {"name": self.name, "digest": self.digest, "dimension": self.dimension}


Make = Callable[[], Extractor]


def _reference(
    joint: Joint, reference: Callable[[], Reference], batch_size: int, shared: bool = False
) -> Make:
    def make() -> Extractor:
        found = reference()
        return Extractor("reference", found.digest, found.dimension, found.features)

    return make


def _joint(
    joint: Joint, reference: Callable[[], Reference], batch_size: int, shared: bool = False
) -> Make:
    def extract(images: Pixels) -> Float[np.ndarray, "n d"]:
        def values(rows: slice) -> np.ndarray:
            found = features(joint, images[rows], JOINT_T, JOINT_BLOCKS, batch_size=batch_size)
            return found.values

        return in_shares(values, len(images), shared)

    dimension = sum(widths(joint.model)[block] for block in JOINT_BLOCKS)
    return lambda: Extractor("joint", joint.digest, dimension, extract, kept=False)


def _inception(
    joint: Joint, reference: Callable[[], Reference], batch_size: int, shared: bool = False
) -> Make:
    network = _inception_network()
    import torch

    def extract(images: Pixels) -> Float[np.ndarray, "n d"]:
        def of_batch(_: None, x: np.ndarray) -> np.ndarray:
            rgb = np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x
            with torch.no_grad():
                (found,) = network(torch.from_numpy(np.moveaxis(rgb, 3, 1).copy()))
            return found.numpy()

        return of_images(of_batch, None, images, min(batch_size, INCEPTION_BATCH), shared)

    arrays = [x.numpy() for _, x in sorted(network.state_dict().items())]
    return lambda: Extractor("inception", digest(arrays), 2048, extract)


def _inception_network() -> Any:
    """The InceptionV3 of torch-fidelity, with its weights from $JDM_INCEPTION, or else downloaded
    by torch-fidelity. Raises InvalidValue where either is missing."""

    def refuse(value: Any, allowed: str, hint: str, parameter: str = "features"):
        raise InvalidValue(parameter, value, allowed, f"{hint}; {OTHERS}") from None

    try:
        import torch
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError:
        refuse("inception", "needs torch-fidelity", "pip install 'jdm[fid]' installs it")
    where, path = f"its weights are at {inception.URL_INCEPTION_V3}", None
    if given := os.environ.get(INCEPTION):
        path = local_path(INCEPTION, given)
        if not Path(path).is_file():
            refuse(given, "is not a file", where, INCEPTION)
        try:  # only arrays: torch-fidelity would also run code that a file contains
            torch.load(path, weights_only=True)
        except Exception as error:  # of several types, by what is wrong with the file
            why = " ".join(str(error).split())[:100]
            refuse(given, f"holds no weights that can be read ({why})", where, INCEPTION)
    try:
        return inception.FeatureExtractorInceptionV3("inception", ["2048"], path)
    except OSError as error:
        download = f"needs weights that could not be downloaded ({error})"
        refuse("inception", download, f"{where}, and ${INCEPTION} is the path of a copy")
    except RuntimeError as error:  # of the download's checksum, or of arrays that do not fit
        why = " ".join(str(error).split())[:100]
        refuse(
            given or NO_VALUE, f"holds other weights than InceptionV3's ({why})", where, INCEPTION
        )


# (joint, a function that makes the reference classifiers, images at once, shared=False) -> a
# function that makes the features. What may be missing is looked for at once; a reference
# classifier is trained later. shared: whether all processes of a run extract features together.
EXTRACTORS: dict[str, Callable[..., Make]] = names.EXTRACTORS.records(
    reference=_reference, joint=_joint, inception=_inception
)


def real_features(
    extractor: Extractor, images: Pixels, cache: Path, shared: bool = False
) -> Float[np.ndarray, "n d"]:
    """The features of real images, from a file in the folder `cache`, which is written first if it
    is missing. Means and covariances take less time to compute from them than they took. shared:
    whether all processes of a run call this together; the file is that of process 0.

    The file is found by the features' identity, and by the images' number, size and contents.
    Raises Failure where it is damaged.
    """
    if not extractor.kept:
        return extractor.extract(images)
    shape, contents = "x".join(map(str, images.shape)), digest([images])
    folder = cache / f"features-{extractor.name}-{extractor.digest}-{shape}-{contents}"
    path, expected = folder / "features.npy", (len(images), extractor.dimension)
    reads = not shared or distributed.is_main()
    if distributed.from_main(folder.exists()) if shared else folder.exists():
        found = _read(path, expected) if reads else np.zeros(expected, np.float32)
        return distributed.from_main(found) if shared else found
    found = extractor.extract(images)
    if reads:
        content = io.BytesIO()
        np.save(content, found)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_folder(folder, f"{uuid.uuid4().hex[:8]}.part") as unfinished:
                (unfinished / path.name).write_bytes(content.getvalue())
        except OSError:
            if not folder.exists():  # otherwise another process has written the same file
                raise
    return found


def _read(path: Path, expected: tuple[int, ...]) -> Float[np.ndarray, "n d"]:
    """The features in a file. Raises Failure where it is damaged."""
    try:
        found = np.load(path)
        if found.shape != expected:
            raise ValueError(f"its shape is {found.shape} instead of {expected}")
    except (OSError, ValueError, EOFError) as error:
        raise Failure(f"{path} is damaged ({error}): delete {path.parent}") from error
    return found
