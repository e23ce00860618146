"""Samplers side by side: how fast they are, how often right, and how near to real images.

    python benchmarks/sampling.py --checkpoint=digits --out=runs/sampling-digits
    python benchmarks/sampling.py --checkpoint=runs/mnist --out=runs/sampling-mnist \\
        --samplers=ddim --steps=10,15,20 --options='{"eta": 1.0}' --quality-of-baselines=256

Writes a table, report.json and the first 100 images of each row to --out. The rows are sampler ×
steps × guidance (× --options), with jdm.sample's defaults for all else, and what they are to beat:

    published        the published procedure: ancestral, all T steps, the representations moved by
                     1000 times the gradient, the estimate of the clean image not held in [-1, 1];
                     --published='{"scale": -70}' gives it the best scale of the network instead
    representation   the same steps, clipped, with the representation guidance of jdm
    ddim             50 steps of DDIM, clipped, eta = 0, with that guidance

Protocol. Image i of every row has the seed --seeds + i and asks for class i modulo K. Images are
made in batches of 64 and in rounds, a batch of each row a round, so that a machine that drifts does
so for all; all is compiled before. The time of a row is the median of its first --repeats, from
the call to pixels on the host; ratios are of such medians. The reference classifiers are fitted on
the training images: an SVC and the nearest neighbour up to 16 pixels a side, above that a network
(jdm.analysis.reference). The columns:

    evaluations   how often the sampler asks for the estimate of the noise, guidance and all
    × …           how many times faster than that baseline
    agreement     share of images classified as their label: the lower of the reference classifiers
    distance      Fréchet, of a reference's features to those of the training images. It is larger
                  for fewer images: where rows differ in number, compare those "of the first N"
    neighbours    distance to the nearest training image over that of test images: mean (least)
    diversity     distance within a class over that of training images: mean (least class)
    target        40 times faster than the first two baselines and 3 times than the third, at an
                  agreement and a distance (of equally many) no worse than theirs

The row "real" is the test images. "-" stands where a column needs labels and the row has none.
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
from jdm import plot, startup
from jdm.analysis import metrics
from jdm.analysis.reference import Reference, make_reference
from jdm.data.splits import ReadOptions, Split, cache_root, load_split
from jdm.diffusion.method import OPTIONS, method_of
from jdm.diffusion.samplers import SAMPLERS
from jdm.errors import Failure
from jdm.files import write_whole
from jdm.names import check_name

BATCH = 64
CLIPPED, UNCLIPPED = dict(threshold="static"), dict(threshold="none")
# Options of sampling that this script has flags for.
OF_A_ROW = ("sampler", "steps", "guidance")
TARGET = {"published": 40, "representation": 40, "ddim": 3}  # times faster than these baselines


@dataclasses.dataclass
class Row:
    """Options of sampling, and what was measured of them."""

    name: str
    settings: dict
    count: int  # images that are scored
    samples: "list[jdm.Samples]" = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def labels(self, numbers: np.ndarray, classes: int) -> np.ndarray | None:
        """The labels of the images of these numbers, None without guidance."""
        return None if self.settings["guidance"] == "none" else numbers % classes

    def evaluations(self) -> int:
        steps, each = self.settings["steps"], SAMPLERS[self.settings["sampler"]].evaluations
        return each * steps - (each - 1)  # the last step of Heun's method has no corrector


def baselines(total: int, published: dict) -> dict[str, dict]:
    """The settings that the rows are measured against, for a chain of `total` steps. published:
    what is changed in those of the published procedure."""
    every = dict(sampler="ancestral", steps=total)
    return {
        "published": every | dict(guidance="published", scale=1000.0) | UNCLIPPED | published,
        "representation": every | dict(guidance="representation") | CLIPPED,
        "ddim": dict(sampler="ddim", steps=50, guidance="representation", eta=0.0) | CLIPPED,
    }


def fill(joint: "jdm.Joint", rows: list[Row], first_seed: int, repeats: int) -> None:
    """Compiles the rows, then fills them with batches and their times, round by round."""
    from jdm.sampling.generate import make_generator

    for row in rows:
        started, seeds = time.perf_counter(), np.arange(BATCH)
        labels = row.labels(seeds, joint.model.num_classes)
        make_generator(joint, request_of(joint, row, labels, seeds), BATCH)
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
            row.samples.append(jdm.sample(joint, **batch, **row.settings))
            row.seconds.append(time.perf_counter() - started)
        say(f"round {turn + 1} of {max(rounds)}: {time.perf_counter() - began:.1f} s")


def request_of(joint: "jdm.Joint", row: Row, labels, seeds):
    """The checked request of a row. Raises InvalidValue."""
    from jdm.sampling.request import check_request

    return check_request(joint, method=method_of(None, row.settings), labels=labels, seeds=seeds)


def figures(reference: Reference, train, test, fewest: int, images, labels) -> dict:
    """The figures of uint8 images [N, H, W, C] that should show the labels, if there are any."""
    known, features = reference.features(train.images), reference.features(images)
    labelled = labels is not None
    return {
        "images": len(images),
        "agreement": reference.agreement(images, labels) if labelled else None,
        "distance": metrics.frechet_distance(known, features),
        "distance_of_first": metrics.frechet_distance(known, features[:fewest]),
        "neighbours": metrics.nearest_neighbour_ratio(train.images, test.images, images),
        "diversity": metrics.diversity_ratio(images, labels, *train) if labelled else None,
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
            "diversity": pair(one["diversity"]),
            "target": {True: "yes", False: "no", None: "-"}[one.get("target")],
        }

    lines = [cells(one) for one in found]
    ruled = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def real_images(name: str, split: str, options: ReadOptions) -> Split:
    """The labelled images of a split, as the model takes them, and their labels."""
    images, labels = load_split(name, split, options)
    if labels.ndim > 1:
        raise ValueError(
            f"{name} gives an image several labels; the reference classifiers know one"
        )
    rows = np.flatnonzero(labels >= 0)
    return Split(images[rows], labels[rows], split)


def rows_of(flags: argparse.Namespace, joint: "jdm.Joint") -> list[Row]:
    """The rows to measure. Raises ValueError for options that are not allowed."""
    from jdm.diffusion.guidance import GUIDANCE

    total, count = joint.diffusion.steps, flags.samples
    few = min(count, flags.quality_of_baselines or count)
    if few < 2 * joint.model.num_classes:
        raise ValueError(f"{few} images are too few to score; two of each class are needed")
    if flags.repeats < 1:
        raise ValueError(f"--repeats={flags.repeats} must be positive")
    known = [name for name in OPTIONS if name not in OF_A_ROW]
    for name in flags.published:
        check_name("--published", name, known)
    if flags.published and "published" not in flags.baselines:
        raise ValueError("--published goes with --baselines=published")
    rows = []
    for name in flags.baselines:
        settings = baselines(total, flags.published)[check_name("--baselines", name, TARGET)]
        rows.append(Row(name, settings, few if settings["steps"] == total else count))
    guidances = flags.guidance or [name for name in GUIDANCE if name != "published"]
    every = (flags.samplers or SAMPLERS, flags.steps, guidances, flags.options or [{}])
    for sampler, steps, guidance, options in itertools.product(*every):
        for name in options:
            check_name("--options", name, known)
        name = [sampler, str(steps), guidance, *(f"{key}={options[key]}" for key in options)]
        settings = dict(sampler=sampler, steps=steps, guidance=guidance) | options
        rows.append(Row(" ".join(name), settings, count))
    for row in rows:
        seeds = [flags.seeds, flags.seeds + max(row.count, flags.repeats * BATCH) + BATCH]
        request_of(joint, row, row.labels(np.zeros(1, int), 1), seeds)
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
    add("--published", type=options, default={}, help="a JSON object, such as its best scale")
    add("--samples", type=int, default=1000, help="images that are scored (%(default)s)")
    add("--quality-of-baselines", type=int, help="images of those of all T steps (--samples)")
    add("--seeds", type=int, default=3000, help="the first one (%(default)s)")
    add("--repeats", type=int, default=3, help="rounds that are timed (%(default)s)")
    flags = parser.parse_args()
    startup.set_up()  # before JAX is imported: why some imports, and names, wait
    import jax

    try:
        joint = jdm.load(flags.checkpoint)
        rows, config = rows_of(flags, joint), joint.config
        name, folder = flags.data or config.data.name, flags.data_dir or config.data.dir
        read = ReadOptions.of(config.data, config.model)
        read = dataclasses.replace(read, data_dir=folder, workers=0)
        splits = [real_images(name, split, read) for split in ("train", "test")]
        flags.out.mkdir(parents=True, exist_ok=True)
        reference = make_reference(joint, splits[0], cache_root(read), BATCH)
        test = splits[1]
        fewest = min(len(test.images), *(row.count for row in rows))
        # Shuffled, so that the first so many of them stand for all.
        order = np.random.default_rng(0).permutation(len(test.images))
        real = figures(reference, *splits, fewest, test.images[order], test.labels[order])
        found = [{"name": "real", **real}]
    except (Failure, OSError, ValueError) as error:
        parser.error(str(error))

    fill(joint, rows, flags.seeds, flags.repeats)
    for row in rows:
        images = np.concatenate([batch.images for batch in row.samples])[: row.count]
        labels = row.labels(np.arange(row.count), joint.model.num_classes)
        entry = {
            "name": row.name,
            "settings": row.samples[0].settings,
            "evaluations": row.evaluations(),
            "seconds": statistics.median(row.seconds[: flags.repeats]),
            "timings": row.seconds,
        }
        found.append(entry | figures(reference, *splits, fewest, images, labels))
        picture = plot.png(plot.grid(images[:100], columns=10))
        write_whole(flags.out / f"{row.name.replace(' ', '_')}.png", picture)
    compare(found[1:])
    report = {
        "checkpoint": flags.checkpoint,
        "data": name,
        "training_images": len(splits[0].images),
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
