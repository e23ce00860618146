"""Samplers side by side: how fast they are, how often right, and how near to real images.

    python benchmarks/sampling.py --checkpoint=digits --out=runs/sampling-digits
    python benchmarks/sampling.py --checkpoint=runs/mnist --out=runs/sampling-mnist \\
        --samplers=ddim --steps=10,15,20 --options='{"eta": 1.0}' --quality-of-baselines=256

Writes a table, report.json and the first 100 images of each row to --out. The rows are sampler ×
steps × guidance (× --options), with jdm.sample's defaults for all else, and what they are to beat:

    published        the published procedure: ancestral, all T steps, the representations moved by
                     1000 times the gradient, the estimate of the clean image not held in [-1, 1]
    representation   the same steps, clipped, with the representation guidance of jdm
    ddim             50 steps of DDIM, clipped, eta = 0, with that guidance

Protocol. Image i of every row has the seed --seeds + i and asks for class i modulo K. Images are
made in batches of 64 and in rounds, a batch of each row a round, so that a machine that drifts does
so for all; all is compiled before. The time of a row is the median of its first --repeats, from
the call to pixels on the host; ratios are of such medians. The judge is fitted on the pixels of the
training images and knows nothing of the network (jdm.analysis.metrics.Judge). The columns:

    evaluations   how often the sampler asks for the estimate of the noise, guidance and all
    × …           how many times faster than that baseline
    agreement     share of images that show the asked class: the lower of an SVC and the 1-NN
    distance      Fréchet, of the judge's features to those of the training images. Fewer images
                  are further away: where rows differ in number, compare those "of the first N"
    neighbours    distance to the nearest training image over that of test images: mean (least)
    variety       distance within a class over that of training images: mean (least class)
    target        40 times faster than the first two baselines and 3 times than the third, at an
                  agreement and a distance (of equally many) no worse than theirs

The row "real" is the test images. Where no class is asked for, "-" stands for what depends on it.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import jdm
from jdm import cli, plot
from jdm.analysis import metrics
from jdm.data import DataError
from jdm.data.splits import load_split
from jdm.files import write_whole

BATCH = 64
CLIPPED, UNCLIPPED = dict(threshold="static"), dict(threshold="none")
# Arguments of jdm.sample that this script gives, or that change what is measured: a classifier
# would be read anew in every call.
OF_A_ROW = ("labels", "seeds", "sampler", "steps", "guidance", "classifier", "noise", "film")
OF_A_ROW += ("batch_size",)
TARGET = {"published": 40, "representation": 40, "ddim": 3}  # times faster than these baselines


@dataclasses.dataclass
class Row:
    """A way to sample: the arguments of jdm.sample, and what came of them."""

    name: str
    settings: dict
    count: int  # images that are judged
    made: "list[jdm.Samples]" = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def labels(self, numbers: np.ndarray, classes: int) -> np.ndarray | None:
        """The classes that the images of these numbers are asked for, if any."""
        return None if self.settings["guidance"] == "none" else numbers % classes

    def evaluations(self) -> int:
        steps = self.settings["steps"]  # Heun's method asks twice in each but the last
        return 2 * steps - 1 if self.settings["sampler"] == "heun" else steps


def baselines(total: int) -> dict[str, dict]:
    """The settings that the rows are measured against, for a chain of `total` steps."""
    every = dict(sampler="ancestral", steps=total)
    return {
        "published": every | dict(guidance="published", scale=1000.0) | UNCLIPPED,
        "representation": every | dict(guidance="representation") | CLIPPED,
        "ddim": dict(sampler="ddim", steps=50, guidance="representation", eta=0.0) | CLIPPED,
    }


def make(joint: "jdm.Joint", rows: list[Row], first_seed: int, repeats: int) -> None:
    """Compiles the rows, then fills them with batches and their times, round by round."""
    from jdm.sampling import check
    from jdm.sampling.make import maker

    for row in rows:
        started, seeds = time.perf_counter(), np.arange(BATCH)
        labels = row.labels(seeds, joint.model.num_classes)
        maker(joint, check(joint, labels=labels, seeds=seeds, **row.settings), BATCH)
        say(f"{row.name}: compiled in {time.perf_counter() - started:.1f} s")
    if any(row.settings["guidance"] != "none" for row in rows):
        # What is compiled at its first call, whatever the row: the probability of the label.
        jdm.sample(joint, BATCH, labels=[0], guidance="pixel", steps=1, batch_size=BATCH)
    rounds = [max(repeats, math.ceil(row.count / BATCH)) for row in rows]
    for turn in range(max(rounds)):
        began, numbers = time.perf_counter(), turn * BATCH + np.arange(BATCH)
        for row in (row for row, needed in zip(rows, rounds, strict=True) if turn < needed):
            labels = row.labels(numbers, joint.model.num_classes)
            batch = dict(labels=labels, seeds=first_seed + numbers, batch_size=BATCH)
            started = time.perf_counter()
            row.made.append(jdm.sample(joint, **batch, **row.settings))
            row.seconds.append(time.perf_counter() - started)
        say(f"round {turn + 1} of {max(rounds)}: {time.perf_counter() - began:.1f} s")


def figures(judge: metrics.Judge, train, test, fewest: int, images, labels) -> dict:
    """What there is to say of uint8 images [N, H, W, C] that should show the labels, if any."""
    known, features = judge.features(train[0]), judge.features(images)
    asked = labels is not None
    return {
        "images": len(images),
        "agreement": judge.agreement(images, labels) if asked else None,
        "distance": metrics.frechet_distance(known, features),
        "distance_of_first": metrics.frechet_distance(known, features[:fewest]),
        "neighbours": metrics.nearest_neighbour_ratio(train[0], test[0], images),
        "variety": metrics.diversity_ratio(images, labels, *train) if asked else None,
    }


def compare(found: list[dict]) -> None:
    """Adds to each row how it stands to the baselines among them: "faster" and "target"."""

    def nearness(one: dict, base: dict) -> str:
        return "distance" if one["images"] == base["images"] else "distance_of_first"

    theirs = {one["name"]: one for one in found if one["name"] in TARGET}
    for one in found:
        one["faster"] = {name: base["seconds"] / one["seconds"] for name, base in theirs.items()}
        if one["name"] not in TARGET and one["agreement"] and len(theirs) == len(TARGET):
            one["target"] = all(
                one["faster"][name] >= TARGET[name]
                and min(one["agreement"].values()) >= min(base["agreement"].values())
                and one[nearness(one, base)] <= base[nearness(one, base)]
                for name, base in theirs.items()
            )


def table(found: list[dict], fewest: int) -> str:
    """The figures in Markdown."""
    names = [one["name"] for one in found if one["name"] in TARGET]
    unequal = any(one["images"] > fewest for one in found)

    def pair(ratio: dict | None) -> str:
        return f"{ratio['mean']:.2f} ({ratio['least']:.2f})" if ratio else "-"

    def cells(one: dict) -> dict[str, str]:
        timed, agreement = "seconds" in one, one["agreement"]
        return {
            "row": one["name"],
            "evaluations": str(one["evaluations"]) if timed else "-",
            "s per 64": f"{one['seconds']:.3g}" if timed else "-",
            **{f"× {name}": f"{one['faster'][name]:.1f}" if timed else "-" for name in names},
            "images": str(one["images"]),
            "agreement": f"{min(agreement.values()):.1%}" if agreement else "-",
            "distance": f"{one['distance']:.3g}",
            **({f"of the first {fewest}": f"{one['distance_of_first']:.3g}"} if unequal else {}),
            "neighbours": pair(one["neighbours"]),
            "variety": pair(one["variety"]),
            "target": {True: "yes", False: "no", None: "-"}[one.get("target")],
        }

    lines = [cells(one) for one in found]
    ruled = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def real_images(config, name: str, data_dir: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The labelled images of a split, as the model takes them, and their labels."""
    images, labels = load_split(
        name,
        split,
        data_dir,
        size=config.model.image_size,
        channels=config.model.image_channels,
        classes=config.data.classes,
        validation=config.data.validation,
        cache_dir=config.data.cache_dir,
    )
    if labels.ndim > 1:
        raise ValueError(f"{name} gives an image several labels; the judge knows one")
    # Shuffled, so that the first so many of them stand for all.
    order = np.random.default_rng(0).permutation(np.flatnonzero(labels >= 0))
    return images[order], labels[order]


def rows_of(flags: argparse.Namespace, joint: "jdm.Joint") -> list[Row]:
    """The rows that are asked for; ValueError in one sentence for what cannot be."""
    from jdm.diffusion.guidance import GUIDANCE
    from jdm.diffusion.process import pick
    from jdm.diffusion.samplers import SAMPLERS
    from jdm.sampling.request import check

    total, count = joint.diffusion.steps, flags.samples
    few = min(count, flags.quality_of_baselines or count)
    if few < 2 * joint.model.num_classes:
        raise ValueError(f"{few} images are too few to judge; two of each class are needed")
    if flags.repeats < 1:
        raise ValueError(f"--repeats={flags.repeats} must be positive")
    known = [name for name in jdm.sample.__kwdefaults__ if name not in OF_A_ROW]
    rows = []
    for name in flags.baselines:
        settings = baselines(total)[pick("--baselines", name, TARGET)]
        rows.append(Row(name, settings, few if settings["steps"] == total else count))
    guidances = flags.guidance or [name for name in GUIDANCE if name != "published"]
    every = (flags.samplers or SAMPLERS, flags.steps, guidances, flags.options or [{}])
    for sampler, steps, guidance, options in itertools.product(*every):
        for name in options:
            pick("--options", name, known)
        name = [sampler, str(steps), guidance, *(f"{key}={options[key]}" for key in options)]
        settings = dict(sampler=sampler, steps=steps, guidance=guidance) | options
        rows.append(Row(" ".join(name), settings, count))
    for row in rows:
        seeds = [flags.seeds, flags.seeds + max(row.count, flags.repeats * BATCH) + BATCH]
        check(joint, labels=row.labels(np.zeros(1, int), 1), seeds=seeds, **row.settings)
    if not rows:
        raise ValueError("--baselines and --steps leave nothing to measure")
    return rows


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Errors in one sentence."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    return [int(name) for name in names(text)]


def options(text: str) -> dict:
    return dict(json.loads(text))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a work folder, or the name of a packaged model")
    add("--out", type=Path, required=True, help="the folder of table, report and pictures")
    add("--data", help="the real images, such as folder:mnist5k (what the config says)")
    add("--data-dir", help="where they are prepared (what the config says)")
    add("--samplers", type=names, help="such as ddim,ancestral (all)")
    add("--steps", type=numbers, default="5,8,10,12,15,20,25,50", help="(%(default)s)")
    add("--guidance", type=names, help="such as none,pixel (all but published)")
    add("--options", type=options, action="append", help="a JSON object; again for more rows")
    add("--baselines", type=names, default=",".join(TARGET), help="may be empty (%(default)s)")
    add("--samples", type=int, default=1000, help="images that are judged (%(default)s)")
    add("--quality-of-baselines", type=int, help="images of those of all T steps (--samples)")
    add("--seeds", type=int, default=3000, help="the first one (%(default)s)")
    add("--repeats", type=int, default=3, help="rounds that are timed (%(default)s)")
    flags = parser.parse_args()
    cli.use_compilation_cache()  # before JAX is imported: why some imports, and names, wait
    import jax

    from jdm.checkpoint import CheckpointError
    from jdm.config import ConfigError

    try:
        joint = jdm.load(flags.checkpoint)
        rows, config = rows_of(flags, joint), joint.config
        data = (flags.data or config.data.name, flags.data_dir or config.data.dir)
        splits = [real_images(config, *data, split) for split in ("train", "test")]
        flags.out.mkdir(parents=True, exist_ok=True)
        judge = metrics.Judge(*splits[0])
        fewest = min(len(splits[1][0]), *(row.count for row in rows))
        found = [{"name": "real", **figures(judge, *splits, fewest, *splits[1])}]
    except (CheckpointError, ConfigError, DataError, OSError, ValueError) as error:
        parser.error(str(error))

    make(joint, rows, flags.seeds, flags.repeats)
    for row in rows:
        images = np.concatenate([batch.images for batch in row.made])[: row.count]
        labels = row.labels(np.arange(row.count), joint.model.num_classes)
        entry = {
            "name": row.name,
            "settings": row.made[0].settings,
            "evaluations": row.evaluations(),
            "seconds": statistics.median(row.seconds[: flags.repeats]),
            "timings": row.seconds,
        }
        found.append(entry | figures(judge, *splits, fewest, images, labels))
        picture = plot.png(plot.grid(images[:100], columns=10))
        write_whole(flags.out / f"{row.name.replace(' ', '_')}.png", picture)
    compare(found[1:])
    report = {
        "checkpoint": flags.checkpoint,
        "data": data[0],
        "training_images": len(splits[0][0]),
        "first_seed": flags.seeds,
        "repeats": flags.repeats,
        "fewest": fewest,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "rows": found,
    }
    write_whole(flags.out / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(flags.out / "table.md", table(found, fewest))
    print(f"{table(found, fewest)}\nwrote table.md, report.json and pictures to {flags.out}")


if __name__ == "__main__":
    main()
