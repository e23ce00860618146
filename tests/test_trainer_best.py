"""The best checkpoint of a run and its early end, with metrics that the tests choose."""

import jax
import numpy as np
import pytest

import jdm
from jdm import checkpoint, trainer
from jdm.analysis.evaluators import EVALUATORS
from jdm.config import config_from_dict, config_to_dict, load_config
from jdm.errors import InvalidValue
from jdm.tracking import read_metrics
from jdm.training.best import Best

ACCURACY = {2: 0.3, 4: 0.7, 6: 0.5, 8: 0.7, 10: 0.6, 12: 0.9}  # {step: value}
FLAGS = ("train.steps=12", "log.every=0", "checkpoint.every=5", "checkpoint.keep=1")
FLAGS += ("model.channels=4", "model.multipliers=(1,)", "model.attention=()")  # saved sooner


class Killed(Exception):
    pass


def config_of(*changes):
    return load_config("tiny", [f"--config.{change}" for change in (*FLAGS, *changes)])


@pytest.fixture(scope="module")
def prepared():
    return trainer.prepare(config_of(), trainer.make_mesh())


@pytest.fixture(autouse=True)
def kill(prepared, monkeypatch):
    """Steps take no time and change the EMA alone; kill(step) stops the next run before it."""
    killed = []

    def step(state, batch, root):
        number = int(state.step) + 1
        if number in killed:
            killed.clear()
            raise Killed
        ema = jax.tree.map(lambda x: x + 1, state.ema)
        one = (np.float32(1), np.float32(1))
        return state.replace(step=state.step + 1, ema=ema), {"loss": one}

    def scripted(joint, split, options):
        yield "accuracy", ACCURACY[joint.step]
        yield "cross_entropy", 1 - ACCURACY[joint.step]

    monkeypatch.setattr(trainer, "prepare", lambda *args: prepared)
    monkeypatch.setattr(trainer, "compile_step", lambda *args: step)
    monkeypatch.setitem(EVALUATORS, "classification", scripted)
    return killed.append


def test_the_best_checkpoint_outlives_the_newer_ones(tmp_path):
    trainer.train(config_of("checkpoint.best=cross_entropy", "train.steps=10"), tmp_path)
    assert checkpoint.steps(tmp_path) == [4, 10]  # no step that a cadence alone would save
    best = jdm.load(tmp_path, step="best")
    newest = jdm.load(tmp_path)
    assert best.step == jdm.load(tmp_path / "checkpoints" / "best").step == 4
    assert newest.step == 10
    first, last = (jax.tree.leaves(joint.params)[0] for joint in (best, newest))
    np.testing.assert_allclose(last - first, 6, rtol=1e-5)  # a step adds one


def curve(workdir):
    rows = read_metrics(workdir)
    for row in rows:
        for name in ("seconds", "train/images_per_second"):
            del row[name]
    return rows


def test_a_run_that_was_killed_ends_at_the_same_step_with_the_same_best(tmp_path, kill):
    config = config_of("checkpoint.best=accuracy", "train.patience=3")
    trainer.train(config, tmp_path / "whole")
    assert checkpoint.steps(tmp_path / "whole") == [4, 10]  # no evaluation after 4 is better
    wanted = checkpoint.read_data(tmp_path / "whole", 10)
    assert (wanted["best"]["step"], wanted["best"]["since"]) == (4, 3)
    kill(9)  # after two evaluations that no checkpoint knows of
    with pytest.raises(Killed):
        trainer.train(config, tmp_path / "killed")
    assert checkpoint.steps(tmp_path / "killed") == [4, 5]
    trainer.train(config, tmp_path / "killed")
    assert checkpoint.steps(tmp_path / "killed") == [4, 10]
    assert checkpoint.read_data(tmp_path / "killed", 10) == wanted
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_a_run_that_has_ended_goes_on_with_more_patience(tmp_path, capsys):
    flags = ("checkpoint.best=accuracy", "train.patience=1")
    trainer.train(config_of(*flags), tmp_path)
    assert checkpoint.steps(tmp_path) == [4, 6]
    trainer.train(config_of(*flags), tmp_path)
    said = "is trained already: 1 evaluations found no better accuracy than 0.7 at step 4\n"
    assert said in capsys.readouterr().out and checkpoint.steps(tmp_path) == [4, 6]
    trainer.train(config_of(*flags[:1], "train.patience=9"), tmp_path)
    assert checkpoint.steps(tmp_path) == [12] and jdm.load(tmp_path, step="best").step == 12


def test_another_split_or_metric_begins_a_new_record():
    saved = dict(metric="accuracy", split="validation", step=4, value=0.7, since=1)
    assert Best.of("accuracy", "validation", saved) == Best(**saved)
    assert Best.of("accuracy", "test", saved) == Best("accuracy", "test")
    assert Best.of("brier", "validation", saved) == Best("brier", "validation")


def test_equal_values_and_nans_are_no_better():
    best = Best("accuracy", "test").updated(1, {"accuracy": float("nan")})
    assert (best.step, best.since) == (None, 1) and not best.ends(0) and best.ends(1)
    best = best.updated(2, {"accuracy": 0.5})
    for step, value in enumerate((0.5, float("nan"), 0.4), 3):
        best = best.updated(step, {"accuracy": value})
    assert (best.step, best.value, best.since) == (2, 0.5, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["checkpoint.best=acuracy"], "config.checkpoint.best='acuracy' must be \"\" or one of "),
        (["checkpoint.best=agreement/svc_real"], "config.checkpoint.best='agreement/svc_real' "),
        (["train.patience=2"], "config.train.patience=2 needs config.checkpoint.best, "),
        (
            ["checkpoint.best=bits_per_dimension"],
            "config.checkpoint.best='bits_per_dimension' needs 'likelihood' among config.eval.",
        ),
    ],
)
def test_what_cannot_be_the_best_is_one_sentence_before_the_first_step(changes, said):
    with pytest.raises(InvalidValue) as info:
        config_of(*changes)
    assert str(info.value).startswith(said) and "\n" not in str(info.value)


def test_a_metric_that_is_not_yielded_is_named_at_the_first_evaluation(tmp_path):
    config = config_of("checkpoint.best=accuracy/other")
    said = "accuracy/other' is not what config.eval.metrics yield: accuracy, cross_entropy$"
    with pytest.raises(InvalidValue, match=said):
        trainer.train(config, tmp_path)
    assert read_metrics(tmp_path) == []


def test_a_run_without_a_metric_has_no_best(tmp_path):
    trainer.train(config_of("train.steps=2"), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="has no best checkpoint: it was trained"):
        jdm.load(tmp_path, step="best")


def test_what_cannot_be_evaluated_is_known_before_the_first_step(tmp_path):
    with pytest.raises(InvalidValue, match=r"^config\.eval\.samples=5 are too few: 20 or more"):
        trainer.train(config_of("eval.metrics=generation", "eval.samples=5"), tmp_path)
    assert not checkpoint.steps(tmp_path) and not (tmp_path / "metrics.jsonl").exists()


def test_evaluators_get_the_options_of_the_config(tmp_path, monkeypatch):
    given = []

    def asked(joint, split, options):
        given.append(options)
        yield "accuracy", 0.5

    monkeypatch.setitem(EVALUATORS, "classification", asked)
    flags = ("eval.samples=7", "eval.features=joint", "eval.ood=digits", "eval.batch_size=5")
    trainer.train(config_of(*flags, "train.steps=2"), tmp_path)
    (options,) = given
    assert (options.samples, options.features, options.batch_size) == (7, "joint", 5)
    assert options.load("train").name == "train" and options.other.name == "validation"
    assert options.other.images.shape[1:] == (8, 8, 1)


def test_a_config_without_the_newer_keys_is_read():
    values = config_to_dict(load_config("tiny"))
    for section, key in (("train", "patience"), ("checkpoint", "best"), ("eval", "ood")):
        del values[section][key]
    assert config_from_dict(values) == load_config("tiny")
