import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.data import DataError
from jdm.data.pipeline import epoch_permutation, train_batches
from jdm.data.splits import ReadOptions, training_set

fast = settings(max_examples=30, deadline=None)


def numbered(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n different images, each labelled with its row."""
    labels = np.arange(n, dtype=np.int32)
    images = np.zeros((n, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = labels % 256, labels // 256
    return images, labels


def rows_of(batch: dict) -> list[int]:
    """The rows in a batch, after checking that each image has its label."""
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    rows = batch["image"][:, 0, 0, 0] + 256 * batch["image"][:, 0, 1, 0].astype(int)
    assert np.array_equal(rows, batch["label"])
    return rows.tolist()


def drawn(batches, count: int) -> list[list[int]]:
    return [rows_of(next(batches)) for _ in range(count)]


# Training ----------------------------------------------------------------------------------------


@fast
@given(
    n=st.integers(1, 300),
    rows=st.integers(1, 40),
    hosts=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    count=st.integers(1, 12),
)
def test_global_batches_are_slices_of_the_endless_sequence(n, rows, hosts, seed, count):
    size = rows * hosts
    images, labels = numbered(n)
    epochs = -(-count * size // n)
    endless = np.concatenate([epoch_permutation(n, seed, e) for e in range(epochs)]).tolist()

    by_host = [
        drawn(train_batches(images, labels, batch_size=size, seed=seed, host=h, hosts=hosts), count)
        for h in range(hosts)
    ]
    for b, parts in enumerate(zip(*by_host, strict=True)):
        assert all(len(part) == rows for part in parts)
        assert sum(parts, []) == endless[b * size : (b + 1) * size]


@fast
@given(n=st.integers(1, 200), size=st.integers(1, 50), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_image_once(n, size, epochs):
    batches = train_batches(*numbered(n), batch_size=size, seed=3)
    run = sum(drawn(batches, -(-epochs * n // size)), [])
    for e in range(epochs):
        assert sorted(run[e * n : (e + 1) * n]) == list(range(n))


@fast
@given(
    n=st.integers(1, 100),
    size=st.integers(1, 120),
    position=st.integers(0, 20),
    further=st.integers(0, 5),
)
def test_a_restored_position_continues_exactly(n, size, position, further):
    arrays = numbered(n)
    first = train_batches(*arrays, batch_size=size, seed=1)
    drawn(first, position)
    state = json.loads(json.dumps(first.get_state()))
    expected = drawn(first, 4)

    second = train_batches(*arrays, batch_size=size, seed=1)
    drawn(second, further)  # wherever it is, with batches read ahead
    second.set_state(state)
    assert drawn(second, 4) == expected
    first.set_state(state)
    assert drawn(first, 4) == expected


def test_a_position_saved_by_one_host_holds_for_two():
    arrays = numbered(50)
    alone = train_batches(*arrays, batch_size=8, seed=1)
    drawn(alone, 9)
    state = alone.get_state()
    pair = [train_batches(*arrays, batch_size=8, seed=1, host=h, hosts=2) for h in range(2)]
    for batches in pair:
        batches.set_state(state)
    assert sum((rows_of(next(batches)) for batches in pair), []) == rows_of(next(alone))


def test_workers_yield_the_same_batches_and_continue_exactly(digits_dir, request):
    def batches(workers: int):
        options = ReadOptions(digits_dir, workers=workers)
        arrays = training_set("digits", options, seed=0, limit=40)
        return train_batches(*arrays, batch_size=16, seed=1, workers=workers)

    def end_workers():  # as clusters do, before they kill; also while workers are starting
        while not ended.wait(0.01):
            for worker in multiprocessing.active_children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)

    ended = threading.Event()
    request.addfinalizer(ended.set)
    threading.Thread(target=end_workers, daemon=True).start()
    alone, pair = batches(0), batches(2)
    for position in (0, 7):  # 40 images: across the ends of epochs
        alone.set_state({"next_index": position})
        pair.set_state(json.loads(json.dumps(alone.get_state())))
        for _ in range(12):  # more than are read ahead
            expected, found = next(alone), next(pair)
            chex.assert_trees_all_equal(expected, found, strict=True)
        state = {"next_index": position + 12, "images": 40}
        assert pair.get_state() == alone.get_state() == state


def test_a_position_among_another_number_of_images_is_refused():
    state = train_batches(*numbered(50), batch_size=8, seed=1).get_state()
    with pytest.raises(DataError, match="^training began on 50 images, but there are 49 now$"):
        train_batches(*numbered(49), batch_size=8, seed=1).set_state(state)
    other = train_batches(*numbered(49), batch_size=8, seed=1)
    other.set_state(state | {"next_index": 3}, other_data=True)
    assert other.get_state() == {"next_index": 3, "images": 49}


def test_a_batch_may_be_larger_than_the_split():
    (batch,) = drawn(train_batches(*numbered(5), batch_size=23, seed=0), 1)
    assert np.bincount(batch).tolist().count(5) + np.bincount(batch).tolist().count(4) == 5
    assert len(batch) == 23


def test_order_depends_on_seed_and_epoch_and_is_uniform():
    orders = {tuple(epoch_permutation(20, seed, e)) for seed in range(10) for e in range(10)}
    assert len(orders) == 100
    # Seeds of more than 32 bits must not share the epochs of smaller seeds.
    assert not np.array_equal(epoch_permutation(20, 5, 1), epoch_permutation(20, 2**32 + 5, 0))
    counts = np.zeros((4, 4))
    for e in range(4000):
        counts[np.arange(4), epoch_permutation(4, 0, e)] += 1
    assert np.all(np.abs(counts - 1000) < 150)  # more than five standard deviations


def test_order_never_changes():
    """The rows of saved positions, with every version of numpy."""
    assert epoch_permutation(10, 0, 0).tolist() == [6, 3, 8, 1, 4, 5, 9, 2, 7, 0]
    assert epoch_permutation(10, 7, 3).tolist() == [2, 1, 4, 8, 9, 3, 5, 7, 6, 0]


def test_images_may_have_k_labels():
    images, labels = numbered(5)
    several = np.stack([labels, -labels], axis=1).astype(np.int8)
    batch = next(train_batches(images, several, batch_size=4, seed=0))
    assert batch["label"].dtype == np.int8
    np.testing.assert_array_equal(batch["label"], several[batch["image"][:, 0, 0, 0]])


def test_batches_are_copies():
    images, labels = numbered(6)
    batch = next(train_batches(images, labels, batch_size=6, seed=0))
    batch["image"][:] = 99
    batch["label"][:] = 99
    assert np.array_equal(images, numbered(6)[0]) and np.array_equal(labels, numbered(6)[1])


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 10, "hosts": 4}, "batch_size is 10, .* multiple of 4, the number of hosts"),
        ({"batch_size": 0}, "batch_size is 0, but must be a positive"),
        ({"batch_size": 8, "host": 2, "hosts": 2}, "host is 2 of 2"),
        ({"batch_size": 8, "host": 0, "hosts": 0}, "host is 0 of 0"),
        ({"batch_size": 8, "host": -1, "hosts": 2}, "host is -1 of 2"),
    ],
)
def test_sizes_and_hosts_are_checked_before_the_first_batch(wrong, message):
    with pytest.raises(ValueError, match=message):
        train_batches(*numbered(20), **wrong, seed=0)


UNGUARDED = """
from jdm.config import load_config
from jdm.trainer import train
train(load_config("tiny", ["--config.data.workers=1"]), "w")
"""
GUARDED = """
import sys
import threading
from jdm.data.pipeline import check_main_guard
def start():
    check_main_guard(1)
    print("started")
if len(sys.argv) and "__main__" == __name__:
    start()
try:
    start()
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("script", [UNGUARDED, GUARDED], ids=["unguarded", "guarded"])
def test_workers_need_a_script_with_a_main_guard(script, tmp_path):
    (tmp_path / "mine.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    said = "config.data.workers=1 starts processes that run "
    assert said in lines[-1] and 'if __name__ == "__main__":' in lines[-1]
    assert os.listdir(tmp_path) == ["mine.py"]
    assert lines[0] == "started" or script is UNGUARDED
