"""Counterfactuals of test images: are they valid, do they last, how near are they?

    python benchmarks/explain.py --checkpoint=digits
    python benchmarks/explain.py --checkpoint=runs/cells --pairs=red:white,white:red --n=50 \\
        --reference=runs/cells_reference --out=cells.png

Protocol: images of the split (test), drawn by --seed among those that the model and, where it is a
network, the reference classifier see rightly; a target that is another class, drawn too, or the
pairs that are given, n of each. The reference classifier is that of jdm.analysis.reference, fitted
on the training images, or the model at --reference. Printed are: agreed, the share of pairs with a
counterfactual in which the reference classifier sees the target; valid and again, the shares in
which the model does, and does after noising and denoising again with noise that the search has not
seen; control, the share of the counterfactuals whose image shows the target to the reference
classifier after the same noise without guidance; nearer, the share of pairs with a counterfactual
that is nearer to its image than the nearest training image of the target class; L1 and L2.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np

import jdm
from jdm.analysis.explain_options import FITTED, OPTIONS
from jdm.analysis.metrics import nearest_distances
from jdm.analysis.reference import make_reference
from jdm.data.splits import ReadOptions, cache_root, load_split
from jdm.diffusion.method import OPTIONS as METHOD

BATCH = 64  # images in one forward pass of a classifier


def drawn(joint, test, right, pairs: str, n: int, seed: int):
    """(rows of the test split, their targets): see the protocol."""
    rng, names = np.random.default_rng(seed), list(joint.class_names)
    if not pairs:
        rows = rng.permutation(np.flatnonzero(right))[:n]
        others = rng.integers(1, joint.model.num_classes, len(rows))
        return rows, (test.labels[rows] + others) % joint.model.num_classes
    rows, targets = [], []
    for pair in pairs.split(","):
        source, target = (names.index(name) for name in pair.split(":"))
        found = rng.permutation(np.flatnonzero(right & (test.labels == source)))[:n]
        rows += found.tolist()
        targets += [target] * len(found)
    return np.array(rows), np.array(targets)


def reference_of(joint, path: str, train, read: ReadOptions) -> Callable:
    """uint8 images -> classes [N]."""
    if path == FITTED:
        fitted = make_reference(joint, train, cache_root(read), BATCH)
        return next(iter(fitted.predictors.values()))
    other = jdm.load(path)
    return lambda images: jdm.classify(other, images, batch_size=BATCH).argmax(axis=1)


def measure(joint, train, test, rows, targets, reference, options) -> tuple[dict, object]:
    """(figures, the Explanations) of these pairs."""
    images = test.images[rows]
    found = jdm.explain(joint, images, targets.tolist(), reference=reference, **options)
    control = reference(found.found.control) == targets
    nearest = np.zeros(len(rows))
    for k in np.unique(targets):
        of = targets == k
        nearest[of] = nearest_distances(train.images[train.labels == k], images[of])
    searched = found.searched
    figures = {
        "pairs": len(rows),
        "unlike": float(1 - searched.mean()),
        "valid": found.valid[searched].mean(),
        "agreed": found.agreed[searched].mean(),
        "again": (found.valid & found.found.still)[searched].mean(),
        "control": control[found.valid].mean(),
        "nearer": (found.valid & (found.l2 < nearest))[searched].mean(),
        "l1": found.l1[found.valid].mean(),
        "l2": found.l2[found.valid].mean(),
        "strength": np.nanmean(found.found.strength),
    }
    return {k: round(float(v), 4) for k, v in figures.items()}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--reference", default=FITTED, help="a model that classifies")
    parser.add_argument("--pairs", default="", help="source:target,… by name (drawn)")
    parser.add_argument("--n", type=int, default=200, help="pairs, or images of each of --pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of pairs")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", default="", help="a .png of the first counterfactuals")
    for name, option in {**OPTIONS, **METHOD}.items():
        parser.add_argument(f"--{name}", help=option.flag_help.replace("%", "%%"))
    flags = parser.parse_args()
    joint = jdm.load(flags.checkpoint)
    read = ReadOptions.of(joint.config.data, joint.config.model)
    train, test = (load_split(joint.config.data.name, s, read) for s in ("train", flags.split))
    reference = reference_of(joint, flags.reference, train, read)
    right = jdm.classify(joint, test.images).argmax(axis=1) == test.labels
    agrees = reference(test.images) == test.labels
    print(f"right on {flags.split}: model {right.mean():.3f}, reference {agrees.mean():.3f}")
    rows, targets = drawn(joint, test, right & agrees, flags.pairs, flags.n, flags.seed)
    options = {
        name: option.read(name, text)
        for name, option in {**OPTIONS, **METHOD}.items()
        if (text := getattr(flags, name)) is not None
    }
    figures, found = measure(joint, train, test, rows, targets, reference, options)
    print(json.dumps(options | figures))
    for pair in filter(None, flags.pairs.split(",")):
        target = list(joint.class_names).index(pair.split(":")[1])
        of = targets == target
        agreed = found.agreed[of].mean()
        print(f"{pair}: valid {found.valid[of].mean():.3f}, agreed {agreed:.3f}")
    if flags.out:
        found.save(flags.out)


if __name__ == "__main__":
    main()
