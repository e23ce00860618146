"""Images per second: our batches beside grain image by image and a PyTorch DataLoader.

    python benchmarks/data.py --folder=PATH [--seconds=5]

PATH is a folder of tens of thousands of images, with a sub-folder for each class; 32×32 JPEG files
for docs/performance.md. Needs the extra `torch`. Protocol: two cores; batches of 256 images of
32×32×3 in random order, on the host. Each method runs three times, alternating with the others, in
a new process each time. The first batches are not counted. All methods read the same images:

    decoded images   one uint8 array, mapped from the file of decoded images; grain with its default
                     ReadOptions, the DataLoader with two workers
    encoded images   the DataLoader's two workers open the files with PIL; jdm decodes the records
                     of `jdm data prepare`: once before the first batch, or always in two workers

Prints the median and the three runs of each method, and the speed of jdm relative to the others
in the same run (median, least to greatest); then the time to prepare, decode and open the images.
Writes only a temporary folder.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from timing import spread

from jdm.data.folder import listing
from jdm.data.images import decoded_split
from jdm.data.lookup import dataset
from jdm.data.pipeline import train_batches
from jdm.data.prepare import prepare
from jdm.data.records import Records
from jdm.data.splits import ReadOptions, load_split, training_set

BATCH, SIZE, CHANNELS, WORKERS, RUNS, WARM_UP = 256, 32, 3, 2, 3, 20


class Rows:
    """A decoded split, image by image."""

    def __init__(self, folder: str, data_dir: str):
        images, self._labels = load_split(f"folder:{folder}", "train", read_options(data_dir))
        self._images = np.asarray(images)  # rows of a memmap are slower

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self._images[i], int(self._labels[i])


class Files:
    """The files of a folder, decoded one by one."""

    def __init__(self, folder: str):
        self._root, self._files = Path(folder).expanduser(), listing(folder).files["train"]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        from PIL import Image

        path, label = self._files[i]
        return np.asarray(Image.open(self._root / path).convert("RGB")), label


def read_options(data_dir: str, workers: int = 0) -> ReadOptions:
    return ReadOptions(data_dir, SIZE, CHANNELS, workers=workers)


def ours(folder: str, data_dir: str, workers: int = 0) -> Iterator:
    images, labels = training_set(f"folder:{folder}", read_options(data_dir, workers), seed=0)
    return train_batches(images, labels, batch_size=BATCH, seed=0, workers=workers)


def ours_in_workers(folder: str, data_dir: str) -> Iterator:
    return ours(folder, data_dir, WORKERS)


def grain_by_image(folder: str, data_dir: str) -> Iterator:
    import grain

    rows = grain.MapDataset.source(Rows(folder, data_dir))
    return iter(rows.seed(0).shuffle().repeat().batch(BATCH).to_iter_dataset())


def quiet(worker: int) -> None:
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def data_loader(source: Rows | Files) -> Iterator:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        source,
        BATCH,
        worker_init_fn=quiet,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        drop_last=True,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def data_loader_of_rows(folder: str, data_dir: str) -> Iterator:
    return data_loader(Rows(folder, data_dir))


def data_loader_of_files(folder: str, data_dir: str) -> Iterator:
    return data_loader(Files(folder))


def images_per_second(method, folder: str, data_dir: str, seconds: float) -> float:
    batches = method(folder, data_dir)
    for _ in range(WARM_UP):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - started)


class TimedRecords(Records):
    """Records that store the time at which the decoders have started."""

    def __iter__(self) -> Iterator[dict]:
        for i, record in enumerate(super().__iter__()):
            if i == WARM_UP * BATCH:
                self.started = time.perf_counter()
            yield record


def decoded_per_second(method, folder: str, data_dir: str, seconds: float) -> float:
    """The rate at which the whole split is decoded into a new folder."""
    with tempfile.TemporaryDirectory(dir=data_dir) as fresh:
        records = TimedRecords(dataset(f"folder:{folder}"), "train", data_dir)
        decoded_split(Path(fresh) / "split", records, SIZE, CHANNELS)
        return (len(records) - WARM_UP * BATCH) / (time.perf_counter() - records.started)


DECODED = {
    "ours": (images_per_second, ours),
    "grain, image by image": (images_per_second, grain_by_image),
    "DataLoader": (images_per_second, data_loader_of_rows),
}
ENCODED = {
    "ours, decoded once": (decoded_per_second, None),
    "ours, in two workers": (images_per_second, ours_in_workers),
    "DataLoader, PIL": (images_per_second, data_loader_of_files),
}


def measure(methods: dict, *arguments) -> dict[str, list[float]]:
    """Images per second of each method; they alternate, each time in a new process."""
    figures = {name: [] for name in methods}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(RUNS):
        for name, (figure, method) in methods.items():
            with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                figures[name].append(alone.submit(figure, method, *arguments).result())
    return figures


def say(title: str, figures: dict[str, list[float]]) -> None:
    print(f"\n{title}, images per second: median (each run)")
    for name, runs in figures.items():
        each = ", ".join(f"{one:,.0f}" for one in runs)
        compared = []
        for mine in (mine for mine in figures if mine.startswith("ours") > name.startswith("ours")):
            ratios = [ours / theirs for ours, theirs in zip(figures[mine], runs, strict=True)]
            compared.append(f"{mine}: {spread(ratios)} times as fast")
        median = statistics.median(runs)
        print(f"  {name:24}{median:>10,.0f}  ({each})  {'; '.join(compared)}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="of images, by class")
    parser.add_argument("--seconds", type=float, default=5, help="of a measurement (%(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder

    if hasattr(os, "sched_setaffinity"):  # inherited by child processes
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as data_dir:
        times = [time.perf_counter()]
        prepare(f"folder:{folder}", data_dir)
        times.append(time.perf_counter())
        prepare(f"folder:{folder}", data_dir, size=SIZE)
        times.append(time.perf_counter())
        split = load_split(f"folder:{folder}", "train", read_options(data_dir))
        times.append(time.perf_counter())
        for title, methods in (("decoded images", DECODED), ("encoded images", ENCODED)):
            say(title, measure(methods, folder, data_dir, arguments.seconds))
    preparing, first, again = np.diff(times)
    print(
        f"\n{len(split.images):,} images: prepared in {preparing:.1f} s, decoded in {first:.1f} s, "
        f"then opened in {again:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
