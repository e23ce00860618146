"""jdm probe: probes by block and noise level, what they are chosen on, and the command's files."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import jdm
from jdm.analysis import probe_report
from jdm.analysis.probe import PROBES, check, labelled, probe, shape_over_t
from jdm.analysis.probe_options import ProbeOptions, default_levels
from jdm.data.splits import Split, load_split
from jdm.errors import InvalidValue

EACH = 180  # images of a split, and of a batch, so that the network is compiled once


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


@pytest.fixture(scope="module")
def splits():
    found = {name: load_split("digits", name) for name in ("train", "validation", "test")}
    return {name: Split(one.images[:EACH], one.labels[:EACH], name) for name, one in found.items()}


OPTIONS = ProbeOptions(levels=(10, 0), blocks=("mid", "stem"), images=EACH)


@pytest.fixture(scope="module")
def found(joint, splits):
    return probe(joint, splits, OPTIONS, batch_size=EACH)


def test_a_cell_is_the_best_logistic_regression_of_the_features(joint, splits, found):
    """Against scikit-learn on the features of `jdm.features`; each image has noise of its own."""
    assert found.levels == (0, 10) and found.blocks == ("stem", "mid")
    x = {
        name: jdm.features(joint, one.images, 10, found.blocks, seed=i * EACH, batch_size=EACH)
        for i, (name, one) in enumerate(splits.items())
    }
    for j, block in enumerate(found.blocks):
        scores = []
        for c in PROBES["linear"].candidates:
            one = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
            one.fit(x["train"].of(block), splits["train"].labels)
            scores.append(one.score(x["validation"].of(block), splits["validation"].labels))
        grid = found.grids["linear"]
        assert grid.accuracy[1, j] == max(scores)
        assert grid.settings[1, j] == PROBES["linear"].candidates[np.argmax(scores)]


def test_the_choice_is_that_of_validation_and_the_same_in_every_run(
    joint, splits, found, monkeypatch
):
    rng, passes = np.random.default_rng(0), []
    spied = lambda *args, **kwargs: passes.append(args) or jdm.features(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("jdm.analysis.probe.features", spied)
    hidden = Split(splits["test"].images, rng.permutation(splits["test"].labels), "test")
    again = probe(joint, {**splits, "test": hidden}, OPTIONS, batch_size=EACH)
    # One pass for all blocks of a level and split; of the test images only at the chosen levels.
    assert len(passes) == 2 * len(found.levels) + len(PROBES)
    for kind, grid in found.grids.items():
        i, j = np.unravel_index(grid.accuracy.argmax(), grid.accuracy.shape)
        assert (grid.level, grid.block) == (found.levels[i], found.blocks[j])
        assert (grid.validation, grid.setting) == (grid.accuracy[i, j], grid.settings[i, j])
        other = again.grids[kind]
        np.testing.assert_array_equal(other.accuracy, grid.accuracy)
        assert (other.level, other.block, other.setting) == (grid.level, grid.block, grid.setting)
        assert other.test < 0.25 < grid.test  # labels at random against those of the images
    assert again.pixels["linear"] < 0.25 and found.pixels["linear"] > 0.8
    own = jdm.classify(joint, splits["test"].images, batch_size=EACH).argmax(axis=1)
    assert found.classifier == np.mean(own == splits["test"].labels)


def test_probes_that_do_not_converge_are_counted(found, joint, splits, monkeypatch, recwarn):
    assert found.grids["linear"].stopped == found.grids["knn"].stopped == 0
    assert "converged" not in probe_report.as_text({"runs/a": found})
    monkeypatch.setattr("jdm.analysis.probe.ITERATIONS", 2)
    hasty = probe(joint, splits, dataclasses.replace(OPTIONS, blocks=("mid",)), batch_size=EACH)
    cells = hasty.grids["linear"].accuracy.size
    assert hasty.grids["linear"].stopped == cells and hasty.grids["knn"].stopped == 0
    assert f"runs/a: {cells} of {cells} linear probes ended at" in probe_report.as_text(
        {"runs/a": hasty}
    )
    assert not [one for one in recwarn if "converge" in str(one.message)]


def test_unlabelled_images_are_left_out_and_training_images_limited_by_class(splits):
    labels = np.repeat(np.array([-1, 0, 1], np.int32), 60)
    some = {name: Split(one.images, labels, name) for name, one in splits.items()}
    found = labelled(some, dataclasses.replace(OPTIONS, images=40))
    assert list(np.bincount(found["train"].labels)) == [20, 20]
    assert list(np.bincount(found["test"].labels)) == [60, 60]
    np.testing.assert_array_equal(found["test"].images, splits["test"].images[60:])
    other = labelled(some, dataclasses.replace(OPTIONS, images=40, seed=1))
    assert (other["train"].images != found["train"].images).any()


def right(*counts, n=400):
    """Which of n images are right at each level: the first `count` of them."""
    return np.arange(n) < np.array(counts)[:, None]


@pytest.mark.parametrize(
    "name, counts",
    [
        ("hump", (300, 350, 380, 200)),
        ("hump", (300, 380, 379, 200)),
        ("falling", (380, 350, 300, 200)),
        ("rising", (200, 300, 380, 379)),
        ("undecided", (380, 380, 300, 200)),  # flat, then lower
        ("undecided", (375, 380, 300, 200)),  # a hump of 5 images: 2.2 standard errors
        ("undecided", (300, 380, 300, 380, 200)),  # two humps
        ("undecided", (300, 380)),
    ],
)
def test_shapes_over_t(name, counts):
    levels = tuple(range(len(counts)))
    assert shape_over_t(levels, right(*counts)).name == name
    assert shape_over_t(tuple(t + 1 for t in levels), right(*counts)).name == "undecided"
    said = shape_over_t(levels, right(*counts), saw_labels=True).sentence
    assert ("trained on labels" in said) == (name in ("hump", "falling"))


def test_default_levels_are_noise_levels():
    assert default_levels(500) == (0, 5, 10, 25, 50, 100, 200, 300)
    assert default_levels(1) == (0,)
    for steps in (2, 7, 50, 4000):
        levels = default_levels(steps)
        assert levels[0] == 0 and levels[-1] < steps and list(levels) == sorted(set(levels))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(train=None), r"^splits=\('validation', 'test'\) has no train; a probe needs train, "),
        (dict(validation=-1), "^split='validation' has no labelled image$"),
        (dict(train=3), "^images=180 leaves 180 labelled training images and 1 class; a probe "),
    ],
)
def test_splits_that_cannot_be_used(joint, splits, change, said):
    given = dict(splits)
    for name, label in change.items():
        one = given.pop(name)
        if label is not None:
            given[name] = Split(one.images, np.full_like(one.labels, label), name)
    with pytest.raises(InvalidValue, match=said):
        probe(joint, given, OPTIONS, batch_size=EACH)


def test_a_multi_label_model_is_refused(joint):
    model = joint.model.clone(multi_label=True)
    with pytest.raises(InvalidValue, match="^joint is a multi-label model; a probe needs images"):
        check(dataclasses.replace(joint, model=model), ProbeOptions())


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_numbers_and_one_picture_of_all_models(run, tiny, tmp_path):
    older, out = tiny / "checkpoints" / "2", tmp_path / "probe"
    flags = ("--levels=0,10", "--blocks=stem,mid", f"--images={EACH}", f"--out={out}")
    done = run("probe", f"--checkpoint={tiny},{older}", *flags)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [out]
    assert {path.name for path in out.iterdir()} == {"probe.json", "probe.csv", "probe.png"}

    written = json.loads((out / "probe.json").read_text())
    assert list(written["models"]) == [str(tiny), str(older)] and written["data"] == "digits"
    rows = list(csv.DictReader((out / "probe.csv").open()))
    assert len(rows) == 2 * len(PROBES) * 2 * 2
    for row in rows:
        model = written["models"][row["checkpoint"]]
        i = model["levels"].index(int(row["t"]))
        accuracies = model["probes"][row["probe"]]["validation_accuracies"]
        assert accuracies[row["block"]][i] == float(row["validation_accuracy"])
    for model in written["models"].values():
        assert model["images"] == {"train": EACH, "validation": 180, "test": 360}
        assert f"{model['probes']['linear']['test_accuracy']:.4f} ± " in done.stdout
        assert model["shape_over_t"]["sentence"] in done.stdout
    with Image.open(out / "probe.png") as picture:
        assert picture.width > picture.height / 2 > 200


def test_a_run_that_fails_leaves_nothing(run, tiny, tmp_path, monkeypatch):
    def full(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(probe_report, "as_png", full)
    flags = (f"--images={EACH}", "--levels=0,10", "--blocks=stem,mid")
    done = run("probe", f"--checkpoint={tiny}", f"--out={tmp_path / 'probe'}", *flags)
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert done.stderr.endswith("jdm probe: the disk is full\n")


@pytest.mark.parametrize(
    "flags, status, said",
    [
        (["--levels=0,50"], 2, "--levels=(0, 50) must lie in [0, 50), the noise levels of this"),
        (["--levels=-1"], 2, "--levels=(-1,) must be one or more different whole numbers from 0"),
        (["--levels=x"], 2, "--levels=('x',) must be one or more different whole numbers"),
        (["--blocks=middle"], 2, "--blocks='middle' is unknown; known: stem, encoder_0_0, "),
        (["--images=0"], 2, "--images=0 must be positive"),
        (["--images=19"], 2, "--images=19 leaves 19 labelled training images and "),
        (["--validation=2"], 2, "--validation=2.0 must be at least 0 and below 1"),
        (["--checkpoint=TINY"], 2, "must be different paths"),
        (["--checkpoint=/gone"], 2, "--checkpoint='/gone' cannot be loaded: "),
        (["--out=FULL"], 2, "exists and is not empty; a new folder is needed"),
        (["--data=folder:TRAIN"], 2, "has no split test; a probe needs train, validation, test"),
        (["--data=folder:/gone"], 2, "--data='folder:/gone' is not a folder"),
    ],
)
def test_wrong_flags_are_one_sentence(run, tiny, tmp_path, flags, status, said):
    full, train = tmp_path / "full", tmp_path / "mine" / "train"
    full.mkdir()
    (full / "notes.txt").touch()
    for label in range(10):
        (train / str(label)).mkdir(parents=True)
        Image.new("L", (8, 8)).save(train / str(label) / "0.png")
    names = {"TINY": tiny, "FULL": full, "TRAIN": train.parent}
    for name, path in names.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    done = run("probe", f"--checkpoint={tiny}", f"--out={tmp_path / 'probe'}", *flags)
    assert done.returncode == status and said in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("jdm probe: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "mine"]


def test_data_that_is_not_prepared_is_one_sentence(run, tiny, tmp_path):
    done = run("probe", f"--checkpoint={tiny}", f"--out={tmp_path / 'out'}", "--data=mnist")
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
