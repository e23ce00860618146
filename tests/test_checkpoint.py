"""jdm.checkpoint: saved trees are restored bit for bit, and damaged ones are never restored."""

import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm import checkpoint
from jdm.checkpoint import CheckpointError

# Late callbacks of a failed save may reach pytest's hook during a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"channels": 8, "levels": [1, 2]}, "name": "tiny"}
DATA = {"step": 7, "seed": 0}


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def make_params():
    rng = np.random.default_rng(0)
    conv = {"kernel": rng.normal(size=(3, 3, 2, 8)), "bias": np.zeros(3)}
    head = {"kernel": rng.normal(size=(8, 4))}
    return {"params": {"conv": cast(conv, jnp.float32), "head": cast(head, jnp.bfloat16)}}


@functools.cache
def make_state():
    params = make_params()
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    rng = np.random.default_rng(1)
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 100, x.dtype), opt_state
    )
    return State(jnp.int32(7), params, opt_state)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(workdir, step, *, keep=10, keep_every=0, **items):
    state = make_state()
    weights = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) / 2, x.dtype), state.params)
    items = {"weights": weights, "train_state": state, "data": DATA, "config": CONFIG} | items
    checkpoint.save(workdir, step, keep=keep, keep_every=keep_every, **items)
    return items


def bits(tree):
    """The arrays as unsigned integers: the sign of a zero counts, and NaN equals itself."""
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def assert_same(got, want):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_equal(bits(got), bits(want))


def step_dir(workdir, step):
    return Path(workdir) / "checkpoints" / str(step)


def names(workdir):
    return sorted(os.listdir(Path(workdir) / "checkpoints"))


def flip(path, bit=None):
    """Flips one bit, in the middle of the file unless told otherwise."""
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One small saved step, never written to."""
    workdir = tmp_path_factory.mktemp("saved")
    return workdir, save(workdir, 7)


@pytest.fixture
def copy(saved, tmp_path):
    """A private copy of that step, to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


# --- round trips ----------------------------------------------------------------------------------


def test_round_trip_is_bitwise(saved):
    workdir, items = saved
    weights, state = items["weights"], items["train_state"]
    got = checkpoint.restore(workdir, 7, weights=abstract(weights), train_state=abstract(state))
    assert got.keys() == {"weights", "train_state"}
    assert_same(got["weights"], weights)
    assert_same(got["train_state"], state)
    assert checkpoint.read_config(workdir, 7) == CONFIG
    assert checkpoint.read_data(workdir, 7) == DATA


def test_layout(saved):
    workdir, _ = saved
    step = step_dir(workdir, 7)
    assert names(workdir) == ["7"]
    assert {p.name for p in step.iterdir()} >= {
        "weights", "train_state", "data", "config", "checksums.json",
    }  # fmt: skip
    files = [p for p in step.rglob("*") if p.is_file() and p.name != "checksums.json"]
    expected = {str(p.relative_to(step)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert json.loads((step / "checksums.json").read_text()) == expected


def test_relative_and_str_paths(saved, monkeypatch):
    monkeypatch.chdir(saved[0].parent)
    relative = saved[0].name
    assert checkpoint.steps(relative) == [7]
    weights = saved[1]["weights"]
    assert_same(checkpoint.restore(relative, 7, weights=abstract(weights))["weights"], weights)


@pytest.mark.parametrize("name", ["lr[0-1]", "a*b", "a\\b", "~x", "ä #%20", os.fsdecode(b"\xe9")])
def test_the_name_of_the_work_folder_is_not_a_pattern(tmp_path, name):
    weights = {"w": np.arange(3, dtype=np.float32)}
    checkpoint.save(tmp_path / name, 1, weights=weights, config=CONFIG, keep=1)
    moved = (tmp_path / name).rename(tmp_path / f"{name}!")
    got = checkpoint.restore(moved, 1, weights=abstract(weights))["weights"]
    np.testing.assert_array_equal(got["w"], weights["w"])
    assert checkpoint.read_config(moved, 1) == CONFIG
    assert os.listdir(tmp_path) == [f"{name}!"]  # nothing was written elsewhere


def test_weights_need_no_train_state(copy, saved):
    """Sampling neither reads nor hashes the optimiser; training notices that it is missing."""
    weights = saved[1]["weights"]
    for path in (step_dir(copy, 7) / "train_state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"garbage")
    assert_same(checkpoint.restore(copy, 7, weights=abstract(weights))["weights"], weights)
    shutil.rmtree(step_dir(copy, 7) / "train_state")
    assert_same(checkpoint.restore(copy, 7, weights=abstract(weights))["weights"], weights)
    assert checkpoint.read_config(copy, 7) == CONFIG
    with pytest.raises(CheckpointError, match="train_state.* is missing"):
        checkpoint.verify(copy, 7)


def test_train_state_and_data_are_optional(tmp_path):
    """`jdm convert` saves neither."""
    weights = make_params()
    checkpoint.save(tmp_path, 0, weights=weights, config=CONFIG, keep=1)
    checkpoint.verify(tmp_path, 0)
    assert_same(checkpoint.restore(tmp_path, 0, weights=abstract(weights))["weights"], weights)
    with pytest.raises(CheckpointError, match="holds no train_state"):
        checkpoint.restore(tmp_path, 0, train_state=abstract(weights))
    with pytest.raises(CheckpointError, match="holds no data"):
        checkpoint.read_data(tmp_path, 0)


def test_is_quiet(tmp_path, capfd):
    items = save(tmp_path, 1)
    checkpoint.restore(tmp_path, 1, weights=abstract(items["weights"]))
    checkpoint.read_config(tmp_path, 1)
    with pytest.raises(CheckpointError):
        save(tmp_path, 2, data=object())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- damage ---------------------------------------------------------------------------------------


def test_one_flipped_bit_at_the_end_of_a_large_file(tmp_path):
    """All of a file is compared, however large."""
    noise = np.random.default_rng(0).normal(size=300_000).astype(np.float32)  # is not compressed
    save(tmp_path, 1, weights={"w": jnp.asarray(noise)})
    files = [p for p in step_dir(tmp_path, 1).rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    assert size > 2**20
    for byte in (2**16, 2**18, 2**20, size - 1):
        flip(largest, bit=8 * byte)
        with pytest.raises(CheckpointError, match="is damaged: it differs from its checksum"):
            checkpoint.verify(tmp_path, 1)
        flip(largest, bit=8 * byte)
    checkpoint.verify(tmp_path, 1)


def test_one_flipped_bit_in_any_file(copy):
    files = sorted(p for p in step_dir(copy, 7).rglob("*") if p.is_file())
    assert len(files) > 20
    for path in files:
        flip(path)
        with pytest.raises(CheckpointError, match="is damaged|is missing|is not listed"):
            checkpoint.verify(copy, 7)
        flip(path)
    checkpoint.verify(copy, 7)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_in_the_checksums(saved, data):
    path = step_dir(saved[0], 7) / "checksums.json"
    content = path.read_bytes()
    bit = data.draw(st.integers(0, len(content.rstrip()) * 8 - 1))
    try:
        flip(path, bit)
        with pytest.raises(CheckpointError):
            checkpoint.verify(saved[0], 7)
    finally:
        path.write_bytes(content)


def test_flipped_bit_in_a_used_item_is_not_restored(copy, saved):
    weights = saved[1]["weights"]
    for path in [p for p in (step_dir(copy, 7) / "weights").rglob("*") if p.is_file()]:
        flip(path)
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.restore(copy, 7, weights=abstract(weights))
        flip(path)
    flip(next(p for p in (step_dir(copy, 7) / "config").rglob("*") if p.is_file()))
    with pytest.raises(CheckpointError, match="config"):
        checkpoint.read_config(copy, 7)


def test_truncated_and_missing_files(copy):
    step = step_dir(copy, 7)
    path = step / "weights" / "manifest.ocdbt"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="manifest.ocdbt is damaged"):
        checkpoint.verify(copy, 7)
    path.unlink()
    with pytest.raises(CheckpointError, match="manifest.ocdbt is missing"):
        checkpoint.verify(copy, 7)
    path.write_bytes(content)
    checkpoint.verify(copy, 7)
    (step / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="checksums.json is missing"):
        checkpoint.verify(copy, 7)


def test_newest_whole_sets_damaged_steps_aside(copy, capsys):
    folder = copy / "checkpoints"
    for step in (8, 9):
        shutil.copytree(folder / "7", folder / str(step))
    flip(folder / "9" / "weights" / "manifest.ocdbt")
    (folder / "8" / "checksums.json").unlink()
    (folder / "9.bad").mkdir()  # set aside earlier
    assert checkpoint.newest_whole(copy) == 7
    lines = capsys.readouterr().out.splitlines()
    assert names(copy) == ["7", "8.bad", "9.bad", "9.bad-2"]
    assert (folder / "9.bad-2" / "weights").is_dir()
    assert re.search("9.bad-2: .*manifest.ocdbt is damaged", lines[0])
    assert re.search("8.bad: .*checksums.json is missing", lines[1])
    assert checkpoint.newest_whole(copy) == 7 and capsys.readouterr().out == "" and len(lines) == 2


@pytest.mark.parametrize("aside", [False, True])
def test_where_no_step_is_whole_training_does_not_start_again(copy, aside):
    folder = copy / "checkpoints"
    shutil.copytree(folder / "7", folder / "8")
    for step in "78":
        flip(folder / step / "config" / "metadata")
    if aside:
        for step in "78":
            (folder / step).rename(folder / f"{step}.bad")
    before = names(copy)
    with pytest.raises(CheckpointError) as info:
        checkpoint.newest_whole(copy)
    said = str(info.value)
    assert said.startswith(f"no checkpoint in {folder} is whole")
    assert "move this folder away" in said
    assert aside or f"{folder / '8' / 'config' / 'metadata'} is damaged" in said
    assert "\n" not in said and names(copy) == before
    folder.rename(copy / "old")  # as the sentence says
    assert checkpoint.newest_whole(copy) is None


EXTRA = ("desktop.ini", "Thumbs.db", ".DS_Store", "._weights", "notes.txt")


def test_what_the_system_or_a_person_adds_is_no_damage(copy, saved):
    step, weights = step_dir(copy, 7), saved[1]["weights"]
    folders = [step.parent, step, *(path for path in step.rglob("*") if path.is_dir())]
    for folder in folders:
        for name in EXTRA:
            (folder / name).write_text("extra")
    (step / "my plots").mkdir()
    assert checkpoint.newest_whole(copy) == 7 and checkpoint.steps(copy) == [7]
    got = checkpoint.restore(copy, 7, weights=abstract(weights))["weights"]
    assert_same(got, weights)
    assert checkpoint.read_data(copy, 7) == DATA


def test_checksums_that_list_nothing_are_damage(copy):
    path = step_dir(copy, 7) / "checksums.json"
    for content, said in (("{}", "weights is not listed"), ("[]", "holds no JSON object")):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=said):
            checkpoint.verify(copy, 7, items=["weights"])


def test_newest_whole_of_nothing(tmp_path):
    assert checkpoint.newest_whole(tmp_path / "new") is None


# --- targets that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "message"),
    [
        ("kernel", (8, 5), "bfloat16", r"kernel: expected bfloat16\[8, 5\], found .*8, 4\]"),
        ("kernel", (8, 4), "float32", r"kernel: expected float32\[8, 4\], found bfloat16"),
        ("kernel", None, "", r"kernel: expected nothing, found bfloat16\[8, 4\]"),
        ("scale", (4,), "float32", r"scale: expected float32\[4\], found nothing"),
    ],
)
def test_mismatch_names_the_key(saved, key, shape, dtype, message):
    target = abstract(saved[1]["weights"])
    like = target["params"]["conv"]["bias"]
    target["params"]["head"][key] = shape and like.update(shape=shape, dtype=jnp.dtype(dtype))
    with pytest.raises(CheckpointError, match=f"params/head/{message}"):
        checkpoint.restore(saved[0], 7, weights=target)


@pytest.fixture
def half(saved, tmp_path):
    """(a work folder of weights in half precision, those weights)."""
    weights = cast(saved[1]["weights"], jnp.float16)
    checkpoint.save(tmp_path, 1, weights=weights, config=CONFIG, keep=1)
    return tmp_path, weights


def test_narrow_floats_are_widened_only_with_widen(half):
    workdir, weights = half
    wide = cast(weights, jnp.float32)
    got = checkpoint.restore(workdir, 1, weights=abstract(wide), widen=True)["weights"]
    assert_same(got, wide)
    with pytest.raises(CheckpointError, match=r"expected float32\[3\], found float16\[3\]"):
        checkpoint.restore(workdir, 1, weights=abstract(wide))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_floats_are_not_widened_to_a_type_that_lacks_some_of_their_values(half, dtype):
    with pytest.raises(CheckpointError, match=f"expected {jnp.dtype(dtype)}.*, found float16"):
        checkpoint.restore(half[0], 1, weights=abstract(cast(half[1], dtype)), widen=True)


def test_floats_are_not_narrowed(saved):
    target = abstract(cast(saved[1]["weights"], jnp.float16))
    with pytest.raises(CheckpointError, match="expected float16.*, found float32"):
        checkpoint.restore(saved[0], 7, weights=target, widen=True)


def test_widening_does_not_allow_another_shape(half):
    target = abstract(cast(half[1], jnp.float32))
    bias = target["params"]["conv"]["bias"]
    target["params"]["conv"]["bias"] = bias.update(shape=(4,))
    with pytest.raises(CheckpointError, match=r"conv/bias: expected float32\[4\], found float16"):
        checkpoint.restore(half[0], 1, weights=target, widen=True)


def test_no_file_contains_the_path_of_the_work_folder(saved):
    workdir = os.fsencode(saved[0])
    for path in step_dir(saved[0], 7).rglob("*"):
        assert not path.is_file() or workdir not in path.read_bytes()


def test_target_without_sharding(saved):
    target = jax.eval_shape(lambda: saved[1]["weights"])
    with pytest.raises(ValueError, match="no sharding at params/conv/bias"):
        checkpoint.restore(saved[0], 7, weights=target)


# --- names and keeping ----------------------------------------------------------------------------


def test_steps_ignores_other_names(copy):
    folder = copy / "checkpoints"
    for name in ("10", "9", "11.partial", "12.bad", "13.bad-2", "007", "-1", "last"):
        (folder / name).mkdir()
    (folder / "14").touch()
    assert checkpoint.steps(copy) == [7, 9, 10]
    assert checkpoint.newest(copy) == 10


def test_a_missing_step_is_one_sentence_that_lists_the_folder(tmp_path, saved):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}.*does not exist"):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match="step 8 in .*, which holds 7$"):
        checkpoint.read_config(saved[0], 8)
    (tmp_path / "checkpoints" / "8.partial").mkdir(parents=True)
    for find in (checkpoint.newest, lambda path: checkpoint.verify(path, 8)):
        with pytest.raises(CheckpointError, match=r"holds 8.partial \(an interrupted save\)"):
            find(tmp_path)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 10] and names(tmp_path) == ["10", "2"]
    save(tmp_path, 1, keep=1)  # a lower step than those there: the new one is kept
    assert names(tmp_path) == ["1", "10"]
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 11, keep=0)


def test_keeps_the_steps_that_divide(tmp_path):
    for step in (0, 2, 3, 4, 5, 6):
        save(tmp_path, step, keep=1, keep_every=3)
    assert checkpoint.steps(tmp_path) == [0, 3, 6]


def test_what_a_person_put_into_a_step_outlives_it(copy):
    folder = copy / "checkpoints"
    (folder / "8.partial" / "weights").mkdir(parents=True)
    for path in ("7/notes.txt", "7/weights/d/notes.txt", "8.partial/notes.txt"):
        (folder / path).write_text("mine")
    (folder / "7" / "desktop.ini").touch()
    for name in ("my.partial", "9.partial.txt", "partial", "10.partial-old"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("all of it")
    (folder / "11.partial").write_text("a file")
    before = {path for path in folder.rglob("thesis.txt")} | {folder / "11.partial"}
    weights = {"w": np.zeros(3, np.float32)}
    with pytest.warns(UserWarning, match="moved files that jdm has not written to .*kept") as said:
        checkpoint.save(copy, 8, weights=weights, config=CONFIG, keep=1)
    assert len(said) == 2 and checkpoint.steps(copy) == [8]
    kept = {str(path.relative_to(folder)) for path in folder.glob("*.kept/**/*") if path.is_file()}
    assert kept == {"7.kept/notes.txt", "7.kept/weights/d/notes.txt", "8.kept/notes.txt"}
    assert all(path.read_text() for path in before)
    assert not (folder / "7.partial").exists() and not (folder / "8.partial").exists()


def test_what_a_link_leads_to_is_not_deleted(copy):
    folder, disk = copy / "checkpoints", copy / "disk"
    disk.mkdir()
    (disk / "thesis.txt").write_text("all of it")
    for path in ("6", "8.partial", "9.partial", "7/plots"):
        (folder / path).symlink_to(disk)
    with pytest.raises(CheckpointError, match="8.partial is a file or a link: move it away"):
        save(copy, 8, keep=1)
    (folder / "8.partial").unlink()
    with pytest.warns(UserWarning, match="7.kept"):
        save(copy, 8, keep=1)
    assert (disk / "thesis.txt").exists() and checkpoint.steps(copy) == [8]
    assert (folder / "7.kept" / "plots").is_symlink() and not (folder / "7.partial").exists()


def test_existing_step_is_not_overwritten(copy, saved):
    with pytest.raises(CheckpointError, match="7 exists already"):
        save(copy, 7, weights=make_params())
    weights = saved[1]["weights"]
    assert_same(checkpoint.restore(copy, 7, weights=abstract(weights))["weights"], weights)
