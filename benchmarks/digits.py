"""The digits from nothing to figures: train, classify the test split, sample, score the samples.

    python benchmarks/digits.py --workdir=runs/digits [--seed=0]

What `make demo` runs, and what docs/results.md was measured with. Protocol: config `digits`;
accuracy on the test split (360 images). For each guidance, 500 samples, 50 of each class, with all
defaults of `jdm.sample`, at seeds 1000 to 1499, which nothing was tuned on. Of the two
reference classifiers, fitted on the training pixels (jdm.analysis.reference), the lower agreement
counts.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

import jdm
from jdm import startup, trainer
from jdm.analysis import metrics
from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.analysis.reference import ReferenceClassifiers
from jdm.config import load_config
from jdm.data.splits import ReadOptions, load_split
from jdm.files import write_whole
from jdm.tracking import read_metrics

GUIDANCE = ("representation", "pixel")
SEEDS = range(1000, 1500)


def score(samples: jdm.Samples, splits: dict) -> dict:
    """The figures of guided samples."""
    train, test = splits["train"], splits["test"]
    classifiers = ReferenceClassifiers(*train)
    return {
        "class_agreement": classifiers.agreement(samples.images, samples.labels),
        "nearest_neighbour_ratio": metrics.nearest_neighbour_ratio(
            train.images, test.images, samples.images
        ),
        "diversity_ratio": metrics.diversity_ratio(samples.images, samples.labels, *train),
        "settings": samples.settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time of the start")
    arguments = parser.parse_args()
    workdir = arguments.workdir

    startup.set_up()
    config = load_config("digits", [f"--config.seed={arguments.seed}"])
    trainer.train(config, workdir)
    joint = jdm.load(workdir)
    options = ReadOptions(data_dir=config.data.dir)
    splits = {name: load_split("digits", name, options) for name in ("train", "test")}
    found = evaluate(joint, ["classification"], splits["test"], EvaluationOptions(360))

    report = {"train_seed": arguments.seed, "test_accuracy": dict(found)["accuracy"]}
    labels = np.arange(len(SEEDS)) % config.model.num_classes
    scores = {}
    for guidance in GUIDANCE:
        samples = jdm.sample(joint, labels=labels, seeds=SEEDS, guidance=guidance)
        scores[guidance] = score(samples, splits)
        picture = "samples.png" if guidance == GUIDANCE[0] else f"samples_{guidance}.png"
        first = slice(0, 100)
        jdm.Samples(
            samples.images[first], samples.labels[first], samples.seeds[first], samples.settings
        ).save(workdir / picture)
    main_figures = scores[GUIDANCE[0]]
    report |= {
        "class_agreement": min(main_figures["class_agreement"].values()),
        "nearest_neighbour_ratio": main_figures["nearest_neighbour_ratio"]["mean"],
        "guidance": scores,
        "train_seconds": read_metrics(workdir)[-1]["seconds"],
        "total_seconds": round(time.time() - arguments.started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    write_whole(workdir / "report.json", json.dumps(report, indent=2) + "\n")
    say(report, workdir)


def say(report: dict, workdir: Path) -> None:
    """The figures for people, and where everything is."""
    print(f"\ntest accuracy            {report['test_accuracy']:.1%} of 360 digits never seen")
    for guidance, figures in report["guidance"].items():
        agreement = figures["class_agreement"]
        neighbours, diversity = figures["nearest_neighbour_ratio"], figures["diversity_ratio"]
        print(
            f"{guidance} guidance, {len(SEEDS)} samples in {figures['settings']['steps']} steps\n"
            f"  classified as asked    {agreement['svc']:.1%} by an SVC, "
            f"{agreement['1-nn']:.1%} by the nearest neighbour\n"
            f"  distance to the data   {neighbours['mean']:.2f} times that of real digits, "
            f"least {neighbours['least']:.2f}\n"
            f"  diversity in a class   {diversity['mean']:.2f} times that of real digits, "
            f"least {diversity['least']:.2f}"
        )
    print(
        f"time                     {report['train_seconds']:.0f} s training, "
        f"{report['total_seconds']:.0f} s in all\n"
        f"peak memory              {report['peak_memory_bytes'] / 2**30:.2f} GiB\n"
        f"pictures                 {workdir / 'samples.png'}, "
        f"{workdir / 'samples_pixel.png'}\n"
        f"figures                  {workdir / 'report.json'}"
    )


if __name__ == "__main__":
    sys.exit(main())
