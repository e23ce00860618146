"""A run through real data and real checkpoints: resuming, claiming a folder, stopping."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm import checkpoint, trainer
from jdm.config import config_from_dict, differences, load_config
from jdm.data.splits import load_split
from jdm.errors import InvalidValue
from jdm.joint import load
from jdm.tracking import read_metrics


def config_of(**sections):
    config = load_config("tiny")
    with config.unlocked():
        for section, values in sections.items():
            config[section].update(values)
    return config


def leaves(workdir, step):
    """Every array of a checkpoint, as saved."""
    config = config_from_dict(checkpoint.read_config(workdir, step))
    run = trainer.prepare(config, trainer.make_mesh())
    target = {
        "step": run.state.step,
        "params": run.state.params,
        "batch_stats": run.state.batch_stats,
        "optimiser": run.state.optimiser,
    }
    items = checkpoint.restore(workdir, step, weights=run.state.ema, train_state=target)
    return jax.tree.leaves_with_path(jax.device_get(items))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of two steps, resumed for two more."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    trainer.train(config_of(train=dict(steps=2)), workdir)
    trainer.train(config_of(), workdir)
    return workdir


def test_two_steps_and_two_more_are_four_bitwise(interrupted, tiny):
    ours, straight = leaves(interrupted, 4), leaves(tiny, 4)
    assert len(ours) == len(straight) > 100
    for (path, a), (_, b) in zip(ours, straight, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert checkpoint.read_data(interrupted, 4) == checkpoint.read_data(tiny, 4)


def test_loss_curve_is_the_one_that_would_have_been(interrupted, tiny):
    ours, straight = read_metrics(interrupted), read_metrics(tiny)
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for a, b in zip(ours, straight, strict=True):
        for name in set(a) - {"seconds", "train/images_per_second"}:
            assert a[name] == b[name]


def test_rows_hold_what_the_design_lists(tiny):
    rows = read_metrics(tiny)
    wanted = {"loss", "diffusion", "cross_entropy", "accuracy", "images_per_second"}
    assert {f"train/{name}" for name in wanted} <= set(rows[0])
    assert rows[-1]["images"] == 4 * 16 and "eval/accuracy" in rows[-1]
    assert "eval/accuracy" not in rows[0]  # every two steps


def test_a_finished_run_is_left_alone(tiny, capsys):
    before = (tiny / "metrics.jsonl").read_bytes()
    trainer.train(config_of(), tiny)
    assert "trained already" in capsys.readouterr().out
    assert (tiny / "metrics.jsonl").read_bytes() == before


def test_a_flipped_bit_costs_one_checkpoint_and_nothing_else(interrupted, tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted, workdir)
    files = [p for p in (workdir / "checkpoints" / "4" / "weights").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        load(workdir, step=4)
    trainer.train(config_of(), workdir)
    out = capsys.readouterr().out
    assert "set aside a damaged checkpoint" in out and "resuming from step 2" in out
    assert (workdir / "checkpoints" / "4.bad").is_dir()
    for (_, a), (_, b) in zip(leaves(workdir, 4), leaves(tiny, 4), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dry_run_writes_nothing(tmp_path, capsys):
    trainer.train(config_of(), tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "compiling the training step" in out and "MiB" in out


def test_a_folder_of_another_config_is_refused_by_key(interrupted):
    before = (interrupted / "config.json").read_bytes()
    other = config_of(optim=dict(lr=0.5), model=dict(channels=16), train=dict(steps=9))
    with pytest.raises(InvalidValue) as info:
        trainer.train(other, interrupted)
    said = str(info.value)
    assert "optim.lr: 0.001 -> 0.5" in said and "model.channels: 8 -> 16" in said
    assert "train.steps" not in said
    assert (interrupted / "config.json").read_bytes() == before


def test_a_list_of_differences_ends_after_ten(tmp_path):
    held, other = config_of(), load_config("reference/cifar10")
    (tmp_path / "config.json").write_text(json.dumps(held.to_dict()))
    count = len(differences(held, other))
    with pytest.raises(InvalidValue, match=rf"; and {count - 10} more\)") as info:
        trainer.check_workdir(other, tmp_path)
    assert count > 12 and str(info.value).count(" -> ") == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    begin = trainer.begin

    def spoilt(*args):
        state = begin(*args)
        return state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(trainer, "begin", spoilt)
    config = config_of(log=dict(every=3), eval=dict(every=0), checkpoint=dict(every=0))
    with pytest.raises(
        trainer.NonFiniteError, match=" at step 1; "
    ):  # not at the third, read first
        trainer.train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == []


def test_metrics_are_sums_over_counts_and_name_the_first_bad_step():
    def row(total, count):
        return {"loss": (np.float32(total), np.float32(count))}

    assert trainer.fetch([row(6, 2), row(0, 0), row(3, 4)], first=1) == {"train/loss": 1.5}
    assert trainer.fetch([row(0, 0)], first=1) == {}  # nothing was labelled: no figure
    with pytest.raises(trainer.NonFiniteError, match="loss is nan at step 11;"):
        trainer.fetch([row(1, 1), row(np.nan, 1), row(np.inf, 1)], first=10)


@pytest.fixture
def source(tiny, tmp_path):
    """A trained work folder that a test may delete."""
    return shutil.copytree(tiny, tmp_path / "source")


def test_a_warm_start_begins_with_the_weights_of_another_run(source, tmp_path, capsys):
    workdir, saved = tmp_path / "run", load(source).params
    config = config_of(train=dict(init_from=str(source), steps=1))
    config.seed = 7  # that of the source would begin near its weights anyway
    trainer.train(config, workdir)
    count = len(jax.tree.leaves(saved))
    assert f"restored {count} of {count} arrays of {source}\n" in capsys.readouterr().out
    for ours, theirs in zip(*map(jax.tree.leaves, (load(workdir).params, saved)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1.1 * config.optim.lr)  # one step of Adam
    shutil.rmtree(source)  # it is not needed any more
    trainer.train(config, workdir)
    assert "trained already" in capsys.readouterr().out


def test_a_warm_start_with_another_head_says_what_is_new(source, capsys):
    config = config_of(model=dict(head_width=12), train=dict(init_from=str(source)))
    run = trainer.prepare(config, trainer.make_mesh())
    saved = trainer.warm_source(config, run)
    dataset = {"class_names": ["O", *saved.class_names[1:]]}
    state = trainer.begin(config, run, jax.random.key(0), saved, dataset)
    total = len(jax.tree.leaves(saved.params))
    said = capsys.readouterr().out
    assert f"restored {total - 7} of {total} arrays of {source}; new: head/" in said
    assert all(f"head/{name}" in said for name in ("in/kernel", "time/bias", "out/kernel"))
    assert "unet" not in said and "head/out/bias" not in said
    assert said.endswith("\nits classes were others: class 0 was '0' and is 'O'\n")
    for tree in (state.params, state.ema["params"]):
        jax.tree.map(np.testing.assert_array_equal, tree["unet"], saved.params["unet"])
        assert tree["head"]["in"]["kernel"].shape[1] == 12
    assert state.step == 0


@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        ({}, "absent", "cannot be loaded: no checkpoint in "),
        ({"channels": 16}, "source", "has another network: unet/"),
    ],
)
def test_a_warm_start_from_nowhere_is_one_sentence_before_any_work(
    source, tmp_path, model, path, said
):
    config = config_of(model=model, train=dict(init_from=str(tmp_path / path)))
    with pytest.raises(InvalidValue) as info:
        trainer.train(config, tmp_path / "run")
    sentence = str(info.value)
    assert sentence.startswith(f"config.train.init_from='{tmp_path / path}' {said}")
    assert "\n" not in sentence and not (tmp_path / "run").exists()


class Watched:
    """An array of a device; lists every use of it in READS."""

    def __init__(self, array):
        self.array = array

    def __getattr__(self, name):
        READS.append(name)
        return getattr(self.array, name)

    def __array__(self, *args, **kwargs):
        READS.append("__array__")
        return np.asarray(self.array)

    def __float__(self):
        return float(np.asarray(self))

    def __int__(self):
        return int(np.asarray(self))

    def __bool__(self):
        return bool(np.asarray(self))


READS: list[str] = []


def test_the_loop_reads_the_device_only_where_it_logs(tmp_path, monkeypatch):
    """Whatever a step returns is read, and waited for, by nothing before the step that logs."""
    before, compile_step = [], trainer.compile_step

    def watched(*args):
        compiled = compile_step(*args)

        def step(state, batch, root):
            before.append(len(READS))
            plain = jax.tree.map(lambda x: getattr(x, "__dict__", {}).get("array", x), state)
            state, metrics = compiled(plain, batch, root)
            if len(before) < 4:  # the last state is saved, too
                state = jax.tree.map(Watched, state)
            return state, jax.tree.map(Watched, metrics)

        return step

    monkeypatch.setattr(trainer, "compile_step", watched)
    READS.clear()
    config = config_of(log=dict(every=4), eval=dict(every=0), checkpoint=dict(every=0))
    trainer.train(config, tmp_path / "run")
    assert before == [0, 0, 0, 0] and READS


@pytest.mark.parametrize(
    "read", [float, int, bool, np.asarray, jax.device_get, jax.block_until_ready, np.sum]
)
def test_a_watched_array_lists_every_use(read):
    READS.clear()
    read(Watched(jnp.float32(1)))
    assert READS


def test_evaluation_during_training_is_of_the_ema(tiny):
    """The last row has what an evaluation of the checkpoint, which holds the EMA, finds."""
    joint, row = load(tiny), read_metrics(tiny)[-1]
    config = joint.config
    split = load_split("digits", "validation", trainer.ReadOptions.of(config.data, config.model))
    options = trainer.EvaluationOptions(config.eval.batch_size)
    found = dict(trainer.evaluate(joint, config.eval.metrics, split, options))
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    assert "accuracy" in numbers
    for name, value in numbers.items():
        np.testing.assert_allclose(row[f"eval/{name}"], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(model=dict(attention=(3,))), "model.attention"),
        (dict(model=dict(image_size=16)), "model.image_size=16"),
        (dict(model=dict(multipliers=(1, 1, 1, 1, 1))), "does not divide by 16"),
        (dict(model=dict(heads=3)), "model.heads=3"),
        (dict(diffusion=dict(steps=15)), "diffusion.steps=15"),
        (dict(loss=dict(classify="noised", augment="digits")), "loss.augment='digits'"),
    ],
)
def test_parts_that_do_not_fit_are_one_sentence_before_anything_is_written(tmp_path, change, said):
    with pytest.raises(InvalidValue, match=said) as info:
        trainer.train(config_of(**change), tmp_path / "run")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()


def warnings_of(**sections) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.prepare(config_of(**sections), trainer.make_mesh())
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("policy", ["published", "repaired", "natural"])
def test_mirroring_where_it_changes_the_class_is_a_warning(policy):
    (said,) = warnings_of(loss=dict(augment=policy))
    assert f"loss.augment={policy!r}" in said and "data.name='digits'" in said
    assert "\n" not in said


@pytest.mark.parametrize("policy", ["none", "digits"])
def test_what_does_not_mirror_is_no_warning(policy):
    assert warnings_of(loss=dict(augment=policy)) == []


def test_parts_that_change_the_loss_are_a_warning():
    """Only BatchNorm normalises over a part."""
    parts = dict(accumulate=2)
    (said,) = warnings_of(model=dict(head="published"), exec=parts)
    assert said.startswith("config.exec.accumulate=2 changes the loss") and "8 rows" in said
    assert warnings_of(exec=parts) == warnings_of(model=dict(head="published")) == []
    alone = dict(terms=("diffusion",))
    assert warnings_of(model=dict(head="published"), exec=parts, loss=alone) == []


def test_config_is_saved_beside_and_in_the_checkpoint(tiny):
    beside = json.loads((tiny / "config.json").read_text())
    assert beside == checkpoint.read_config(tiny, 4)
    assert config_from_dict(beside) == load(tiny).config == load_config("tiny")


def test_training_sees_the_share_of_the_labels_that_is_asked_for(tmp_path, monkeypatch, capsys):
    given = []

    class Stop(Exception):
        pass

    def batches(images, labels, **settings):
        given.append((len(images), labels))
        raise Stop

    monkeypatch.setattr(trainer, "train_batches", batches)
    for fraction in (1.0, 0.1):
        with pytest.raises(Stop):
            trainer.train(
                config_of(data=dict(labelled_fraction=fraction)), tmp_path / f"{fraction}"
            )
    (count, whole), (same, some) = given
    assert count == same == len(some) and (whole >= 0).all()  # every image, not every label
    assert (some >= 0).sum() == round(0.1 * count)
    said = f"training on {count:,} images, {round(0.1 * count)} of them labelled"
    assert said in capsys.readouterr().out
