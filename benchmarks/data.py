"""Images per second: our batches beside grain image by image and a PyTorch DataLoader.

    python benchmarks/data.py --folder=PATH [--seconds=5]

PATH holds images as folder:PATH does, tens of thousands of them; JPEG files of 32×32, for what
docs/results.md says. Needs the extra `torch`. Protocol: two cores; batches of 256 of 32×32×3 in
random order, on the host. Each way runs three times, in turn with the others, in a process of its
own: its first batches are not counted, then those of so many seconds are. Everyone reads the same:

    from the decoded images   one uint8 array, mapped from the file that jdm has decoded them to;
                              grain with its default ReadOptions, the DataLoader with two workers
    from the encoded images   the DataLoader's two workers open the files with PIL; ours decode the
                              records of `jdm data prepare`, once and for all before the first batch
                              or in two workers whenever they are asked for

Prints the medians, the three runs of each, and how many times the others ours is; then how long
preparing, decoding and opening took. Writes nothing but a temporary folder, which is removed.
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

from jdm.data.folder import listing
from jdm.data.images import decoded
from jdm.data.pipeline import train_batches
from jdm.data.prepare import prepare
from jdm.data.records import Records
from jdm.data.splits import load_split, training_set

BATCH, SIZE, CHANNELS, WORKERS, RUNS, WARM_UP = 256, 32, 3, 2, 3, 20


class Rows:
    """A decoded split, image by image."""

    def __init__(self, folder: str, data_dir: str):
        images, labels = whole(folder, data_dir)
        self._images = np.asarray(images)  # a row of a memmap is slower than one of an array
        self._labels = labels

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


def whole(folder: str, data_dir: str, cache_dir: str = "") -> tuple[np.ndarray, np.ndarray]:
    name = f"folder:{folder}"
    shape = dict(size=SIZE, channels=CHANNELS)
    return load_split(name, "train", data_dir, cache_dir=cache_dir, **shape)


def ours(folder: str, data_dir: str, workers: int = 0) -> Iterator:
    name = f"folder:{folder}"
    shape = dict(size=SIZE, channels=CHANNELS)
    images, labels = training_set(name, data_dir, seed=0, workers=workers, **shape)
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


def images_per_second(way, folder: str, data_dir: str, seconds: float) -> float:
    batches = way(folder, data_dir)
    for _ in range(WARM_UP):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - started)


class Noted(Records):
    """Records that note when the decoders have started up."""

    def __iter__(self) -> Iterator[dict]:
        for i, record in enumerate(super().__iter__()):
            if i == WARM_UP * BATCH:
                self.started = time.perf_counter()
            yield record


def decoded_per_second(way, folder: str, data_dir: str, seconds: float) -> float:
    """Of the whole split, decoded into a folder that is not there yet."""
    with tempfile.TemporaryDirectory(dir=data_dir) as fresh:
        records = Noted(f"folder:{folder}", "train", data_dir)
        decoded(Path(fresh) / "split", records, SIZE, CHANNELS)
        return (len(records) - WARM_UP * BATCH) / (time.perf_counter() - records.started)


DECODED = {
    "ours": (images_per_second, ours),
    "grain, image by image": (images_per_second, grain_by_image),
    "DataLoader": (images_per_second, data_loader_of_rows),
}
ENCODED = {
    "ours, once and for all": (decoded_per_second, None),
    "ours, when asked for": (images_per_second, ours_in_workers),
    "DataLoader, PIL": (images_per_second, data_loader_of_files),
}


def measure(ways: dict, *arguments) -> dict[str, list[float]]:
    """The figures of each way, which took turns, each time in a new process."""
    figures = {name: [] for name in ways}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(RUNS):
        for name, (figure, way) in ways.items():
            with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                figures[name].append(alone.submit(figure, way, *arguments).result())
    return figures


def say(title: str, figures: dict[str, list[float]]) -> None:
    print(f"\n{title}, images per second: median (each run)")
    medians = {name: statistics.median(runs) for name, runs in figures.items()}
    for name, median in medians.items():
        each = ", ".join(f"{one:,.0f}" for one in figures[name])
        ratios = [
            f"{mine} is {medians[mine] / median:.2f} times that"
            for mine in medians
            if mine.startswith("ours") and not name.startswith("ours")
        ]
        print(f"  {name:24}{median:>10,.0f}  ({each})  {'; '.join(ratios)}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="of images, a sub-folder for each class")
    parser.add_argument("--seconds", type=float, default=5, help="that a measurement takes")
    arguments = parser.parse_args()
    folder = arguments.folder

    if hasattr(os, "sched_setaffinity"):  # held by every process that this one starts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as data_dir:
        times = [time.perf_counter()]
        prepare(f"folder:{folder}", data_dir)
        times.append(time.perf_counter())
        prepare(f"folder:{folder}", data_dir, size=SIZE)
        times.append(time.perf_counter())
        images, _ = whole(folder, data_dir)
        times.append(time.perf_counter())
        for title, ways in (("decoded images", DECODED), ("encoded images", ENCODED)):
            say(title, measure(ways, folder, data_dir, arguments.seconds))
    preparing, first, again = np.diff(times)
    print(
        f"\n{len(images):,} images: prepared in {preparing:.1f} s, decoded in {first:.1f} s, "
        f"then opened in {again:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
