"""The metrics of generation against independent libraries, on random features.

    python benchmarks/metrics.py                    # scikit-learn, scipy
    pip install 'jdm[fid]'; python benchmarks/metrics.py --inception     # torch-fidelity too

Protocol. Two sets of 900 and 1,100 rows of correlated float32 features, 64 columns, drawn from
--seed. A row of the table is one metric by jdm and by another library, and their relative
difference; the script fails where one is above 1e-4. Where torch-fidelity draws subsets (KID), one
"subset" is a whole set of 900 rows. --inception compares the features of ten random images too, by
an InceptionV3 whose weights are random numbers, between jdm's extractor and torch-fidelity's own.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jdm.analysis import metrics

LARGEST = 1e-4


def random_features(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(real, generated) float32 [1100, 64] and [900, 64]."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(64, 64)) / 8
    real = rng.normal(size=(1100, 64)) @ mix
    generated = rng.normal(size=(900, 64)) @ (0.9 * mix) + 0.2
    return real.astype(np.float32), generated.astype(np.float32)


def by_scipy(real: np.ndarray, generated: np.ndarray) -> Iterator[tuple[str, str, float, float]]:
    """(metric, library, jdm's value, theirs)."""
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import cdist
    from sklearn.metrics.pairwise import polynomial_kernel

    a, b = real.astype(np.float64), generated.astype(np.float64)
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    frechet = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() - 2 * np.trace(root)
    frechet += a.var(axis=0, ddof=1).sum() + b.var(axis=0, ddof=1).sum()
    yield "frechet", "scipy", metrics.frechet_distance(real, generated), frechet

    def off_diagonal(x):
        return polynomial_kernel(x, coef0=1)[~np.eye(len(x), dtype=bool)].mean()

    kernel = off_diagonal(a) + off_diagonal(b) - 2 * polynomial_kernel(a, b, coef0=1).mean()
    yield "kid", "scikit-learn", metrics.kernel_distance(real, generated), kernel

    def share(rows, of):
        return (cdist(rows, of) <= np.sort(cdist(of, of), axis=1)[:, 3]).any(axis=1).mean()

    ours = metrics.precision_recall(real, generated)
    yield "precision", "scipy", ours.precision, share(b, a)
    yield "recall", "scipy", ours.recall, share(a, b)


def by_torch_fidelity(
    real: np.ndarray, generated: np.ndarray
) -> Iterator[tuple[str, str, float, float]]:
    """The same by torch-fidelity; nothing where it is not installed."""
    try:
        import torch
        from torch_fidelity import metric_fid, metric_kid, metric_prc
    except ImportError:
        print("torch-fidelity is not installed, so it is left out\n")
        return
    name = "torch-fidelity"
    a, b = torch.from_numpy(real), torch.from_numpy(generated)
    statistics = [metric_fid.fid_features_to_statistics(x.double()) for x in (a, b)]
    (found,) = metric_fid.fid_statistics_to_metric(*statistics, verbose=False).values()
    yield "frechet", name, metrics.frechet_distance(real, generated), found
    first = a[: len(b)]
    whole = dict(kid_subsets=1, kid_subset_size=len(b), verbose=False)
    found, _ = metric_kid.kid_features_to_metric(first.double(), b.double(), **whole).values()
    yield "kid", name, metrics.kernel_distance(real[: len(b)], generated), found
    precision, recall, _ = metric_prc.prc_features_to_metric(
        b.double(), a.double(), verbose=False
    ).values()
    ours = metrics.precision_recall(real, generated)
    yield "precision", name, ours.precision, precision
    yield "recall", name, ours.recall, recall


@contextlib.contextmanager
def random_inception() -> Iterator[Path]:
    """The path of random weights of InceptionV3, which $JDM_INCEPTION names meanwhile."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            """Keeps the random numbers that the layers were made with."""

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.manual_seed(0)
        torch.save({}, path)
        torch.save(Untrained("random", ["2048"], str(path)).state_dict(), path)
        os.environ["JDM_INCEPTION"] = str(path)
        yield path
        del os.environ["JDM_INCEPTION"]


def inception_features() -> tuple[np.ndarray, np.ndarray]:
    """(jdm's features of ten random images, torch-fidelity's)."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from jdm import load
    from jdm.analysis.extractors import EXTRACTORS

    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    with random_inception() as path:
        ours = EXTRACTORS["inception"](load("digits"), lambda: None, 4).extract(images)
        (theirs,) = FeatureExtractorInceptionV3("inception", ["2048"], str(path))(
            torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        )
    return ours, theirs.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inception", action="store_true", help="compare its features too")
    arguments = parser.parse_args()
    features, worst = random_features(arguments.seed), 0.0
    print("| metric | library | jdm | theirs | relative difference |\n|---|---|---|---|---|")
    for by in (by_scipy, by_torch_fidelity):
        for metric, library, ours, theirs in by(*features):
            difference = abs(ours - theirs) / abs(theirs)
            worst = max(worst, difference)
            print(f"| {metric} | {library} | {ours:.6g} | {theirs:.6g} | {difference:.1e} |")
    if arguments.inception:
        ours, theirs = inception_features()
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        worst = max(worst, difference)
        print(f"\nInception, {ours.shape[1]} features: {difference:.1e} of the largest value")
    if worst > LARGEST:
        sys.exit(f"the largest relative difference is {worst:.1e}, above {LARGEST:g}")


if __name__ == "__main__":
    main()
