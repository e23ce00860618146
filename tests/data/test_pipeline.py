import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.data.pipeline import epoch_permutation, eval_batches, load_split, train_batches

fast = settings(max_examples=30, deadline=None)


def numbered(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n images that differ from each other, each labelled with its row."""
    labels = np.arange(n, dtype=np.int32)
    images = np.zeros((n, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = labels % 256, labels // 256
    return images, labels


def rows_of(batch: dict) -> list[int]:
    """The rows in a batch, after seeing that images and labels belong together."""
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    rows = batch["image"][:, 0, 0, 0] + 256 * batch["image"][:, 0, 1, 0].astype(int)
    assert np.array_equal(rows, batch["label"])
    return rows.tolist()


def drawn(batches, count: int) -> list[list[int]]:
    return [rows_of(next(batches)) for _ in range(count)]


# Reading -----------------------------------------------------------------------------------------

PREPARE_AND_READ = """
import importlib.machinery, socket, sys

def no_network(*args, **kwargs):
    raise AssertionError("asked the network")
socket.getaddrinfo = socket.socket.connect = no_network

# A machine without TensorFlow, whatever is installed here.
find = importlib.machinery.PathFinder.find_spec
def hide(cls, name, path=None, target=None):
    return None if name.split(".")[0] == "tensorflow" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(hide)

from jdm.data.pipeline import load_split
images, labels = load_split("digits", "validation", sys.argv[1])
assert images.shape == (180, 8, 8, 1) and labels.shape == (180,)
assert not {"tensorflow", "jax"} & set(sys.modules)
"""

# Both say that they have begun and wait for the other, so that neither finds the data there.
PREPARE_TOGETHER = """
import pathlib, sys, time
from jdm.data import digits
from jdm.data.pipeline import load_split

me, other = (pathlib.Path(sys.argv[1]) / f"begun-{i}" for i in sys.argv[2:])
generators = digits.Digits._split_generators

def wait_then_generate(self, dl_manager):
    me.touch()
    while not other.exists():
        time.sleep(0.01)
    return generators(self, dl_manager)

digits.Digits._split_generators = wait_then_generate
assert len(load_split("digits", "test", sys.argv[1])[0]) == 360
assert me.exists()
"""


def test_preparing_and_reading_are_quiet_and_need_no_tensorflow_or_network(start_python, tmp_path):
    process = start_python(PREPARE_AND_READ, str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == ""
    assert err == f"Preparing digits in {tmp_path / 'digits' / '1.0.0'}.\n"


def test_two_processes_may_prepare_at_once(start_python, tmp_path):
    pair = [start_python(PREPARE_TOGETHER, str(tmp_path), a, b) for a, b in ("01", "10")]
    for process in pair:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # nothing half-made


def test_a_data_dir_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        load_split("digits", "test", str(tmp_path / "file"))


def test_a_tilde_in_data_dir_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load_split("digits", "validation", "~/data")
    assert (tmp_path / "home" / "data" / "digits" / "1.0.0").is_dir()
    assert not (tmp_path / "~").exists()


def test_unknown_names_and_splits(digits_dir):
    with pytest.raises(ValueError, match=r"data\.name is 'mnits', but must be one of .*digits"):
        load_split("mnits", "train", digits_dir)
    with pytest.raises(
        ValueError, match=r"data\.split is 'val', .* only the splits train, validation, test\."
    ):
        load_split("digits", "val", digits_dir)


def flip_a_bit_of_a_pixel(folder: pathlib.Path) -> None:
    path = next(folder.glob("*test.array_record*"))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT", len(data) // 10) + 8] ^= 1
    path.write_bytes(data)


def cut_the_records_short(folder: pathlib.Path) -> None:
    path = next(folder.glob("*test.array_record*"))
    path.write_bytes(path.read_bytes()[: 1 << 16])


def forget_the_records(folder: pathlib.Path) -> None:
    next(folder.glob("*test.array_record*")).unlink()


def forget_what_it_is(folder: pathlib.Path) -> None:
    (folder / "dataset_info.json").unlink()


def count_wrongly(folder: pathlib.Path) -> None:
    """As if an interrupted or older run had left fewer records, all of them whole."""
    path = folder / "dataset_info.json"
    assert '"360"' in path.read_text()
    path.write_text(path.read_text().replace('"360"', '"359"'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit_of_a_pixel, "hash mismatch"),
        (cut_the_records_short, "record 0 is empty"),
        (forget_the_records, "No such file"),
        (forget_what_it_is, "has not been generated"),
        (count_wrongly, "359 images in test instead of 360"),
    ],
)
def test_damaged_files_are_never_read_as_images(damage, reason, digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "digits" / "1.0.0"
    damage(folder)
    with pytest.raises(RuntimeError, match=f"{reason}.* delete that folder") as info:
        load_split("digits", "test", str(tmp_path))
    assert str(info.value).startswith(f"The prepared files of digits in {folder} cannot be read")


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
def test_a_saved_position_goes_on_exactly(n, size, position, further):
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


def test_a_batch_may_be_larger_than_the_split():
    (batch,) = drawn(train_batches(*numbered(5), batch_size=23, seed=0), 1)
    assert np.bincount(batch).tolist().count(5) + np.bincount(batch).tolist().count(4) == 5
    assert len(batch) == 23


def test_order_depends_on_seed_and_epoch_and_is_uniform():
    orders = {tuple(epoch_permutation(20, seed, e)) for seed in range(10) for e in range(10)}
    assert len(orders) == 100
    # Seeds of more than 32 bits must not run into the epochs of smaller ones.
    assert not np.array_equal(epoch_permutation(20, 5, 1), epoch_permutation(20, 2**32 + 5, 0))
    counts = np.zeros((4, 4))
    for e in range(4000):
        counts[np.arange(4), epoch_permutation(4, 0, e)] += 1
    assert np.all(np.abs(counts - 1000) < 150)  # more than five standard deviations


def test_order_never_changes():
    """A saved position means these rows, under every version of numpy."""
    assert epoch_permutation(10, 0, 0).tolist() == [6, 3, 8, 1, 4, 5, 9, 2, 7, 0]
    assert epoch_permutation(10, 7, 3).tolist() == [2, 1, 4, 8, 9, 3, 5, 7, 6, 0]


def test_labels_may_be_several_to_an_image():
    images, labels = numbered(5)
    several = np.stack([labels, -labels], axis=1).astype(np.int8)
    batch = next(train_batches(images, several, batch_size=4, seed=0))
    assert batch["label"].dtype == np.int8
    np.testing.assert_array_equal(batch["label"], several[batch["image"][:, 0, 0, 0]])
    *_, last = eval_batches(images, several, 3)
    np.testing.assert_array_equal(last["label"], [*several[3:], [-1, -1]])


def test_batches_are_copies():
    images, labels = numbered(6)
    batch = next(train_batches(images, labels, batch_size=6, seed=0))
    batch["image"][:] = 99
    batch["label"][:] = 99
    assert np.array_equal(images, numbered(6)[0]) and np.array_equal(labels, numbered(6)[1])


# Evaluation --------------------------------------------------------------------------------------


@fast
@given(n=st.integers(0, 100), rows=st.integers(1, 20), hosts=st.integers(1, 4))
def test_evaluation_sees_every_image_once(n, rows, hosts):
    by_host = [
        list(eval_batches(*numbered(n), rows * hosts, host=h, hosts=hosts)) for h in range(hosts)
    ]
    seen = []
    for parts in zip(*by_host, strict=True):  # strict: hosts must agree on the number of batches
        for batch in parts:
            assert batch["image"].shape == (rows, 2, 2, 1)
            assert batch["label"].shape == batch["mask"].shape == (rows,)
            assert batch["mask"].dtype == bool
            seen += rows_of({k: v[batch["mask"]] for k, v in batch.items()})
            assert np.all(batch["image"][~batch["mask"]] == 0)
            assert np.all(batch["label"][~batch["mask"]] == -1)
    assert seen == list(range(n))


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [train_batches, eval_batches])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 10, "hosts": 4}, "batch size is 10, .* multiple of 4, the number of hosts"),
        ({"batch_size": 0}, "batch size is 0, but must be a positive"),
        ({"batch_size": 8, "host": 2, "hosts": 2}, "host is 2 of 2"),
        ({"batch_size": 8, "host": 0, "hosts": 0}, "host is 0 of 0"),
        ({"batch_size": 8, "host": -1, "hosts": 2}, "host is -1 of 2"),
    ],
)
def test_sizes_and_hosts_are_checked_before_the_first_batch(batches, wrong, message):
    seed = {"seed": 0} if batches is train_batches else {}
    with pytest.raises(ValueError, match=message):
        batches(*numbered(20), **wrong, **seed)


def test_training_needs_images_and_a_seed_that_is_not_negative():
    with pytest.raises(ValueError, match="no images to train on"):
        train_batches(*numbered(0), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="seed is -1, but must be 0 or more"):
        train_batches(*numbered(4), batch_size=4, seed=-1)
