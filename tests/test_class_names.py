"""A model knows its data: the names of its classes, and what the images and labels were."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jdm
from jdm import checkpoint, plot, trainer
from jdm.config import load_config
from jdm.data import identity
from jdm.diffusion.method import Method
from jdm.errors import Failure, InvalidValue
from jdm.sampling.generate import Batch, concatenate
from jdm.sampling.labels import cycled, parse_labels
from jdm.sampling.request import check_request

DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


def named(joint, *names):
    """The model, with other names of its classes."""
    return dataclasses.replace(joint, dataset={"class_names": [*names, *DIGITS[len(names) :]]})


def test_a_checkpoint_holds_what_the_data_was(tiny, joint):
    held = checkpoint.read_data(tiny, 4)["dataset"]
    assert held["name"] == "digits" and held["splits"]["train"] == 1257
    assert set(held["contents"]) == {"train", "validation", "test"}
    assert joint.class_names == DIGITS


def test_older_checkpoints_have_no_names():
    joint = jdm.load(Path(__file__).parent / "fixtures" / "version_0")
    assert joint.class_names == ()
    with pytest.raises(InvalidValue, match="^names=True cannot be given: this checkpoint does"):
        jdm.classify(joint, [], names=True)


def test_class_probabilities_by_name(joint):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    found = jdm.classify(named(joint, "zero"), images, names=True)
    for row, one in zip(jdm.classify(joint, images), found, strict=True):
        assert set(one) == {"zero", *DIGITS[1:]} and one["zero"] == row[0]
        assert list(one.values()) == sorted(row, reverse=True)


def test_a_resumed_run_refuses_other_data(run, tiny, tmp_path, monkeypatch):
    workdir = Path(shutil.copytree(tiny, tmp_path / "run"))
    config = load_config("tiny", ["--config.train.steps=5"])
    held = checkpoint.read_data(workdir, 4)["dataset"]
    contents, counts = held["contents"] | {"train": "other"}, held["splits"] | {"train": 1200}
    other = held | {"contents": contents, "class_names": ["O", *DIGITS[1:]]}
    monkeypatch.setattr(trainer, "identity_of_run", lambda *given: other)
    resumed = ("train", "--config=tiny", "--config.train.steps=5", f"--workdir={workdir}")
    done = run(*resumed)
    assert done.returncode == 2 and done.stderr == (
        "jdm train: config.data.name='digits' is not what the model was trained on: class 0 was "
        "'0' and is 'O'; train has other images or labels; --other-data trains on it anyway\n"
    )
    assert "compiling" not in done.stdout and checkpoint.steps(workdir) == [2, 4]
    monkeypatch.setattr(trainer, "identity_of_run", lambda *given: other | {"splits": counts})
    with pytest.raises(InvalidValue, match="train had 1,257 images and has 1,200"):
        trainer.train(config, workdir)

    def reached(*given):
        raise Failure("the data was accepted")

    monkeypatch.setattr(trainer, "compile_step", reached)
    done = run(*resumed, "--other-data")
    assert (done.returncode, done.stderr) == (1, "jdm train: the data was accepted\n")


def test_an_evaluation_refuses_other_data(run, tiny, monkeypatch):
    found = identity.identity
    evaluate = ("eval", f"--checkpoint={tiny}", "--split=validation")
    changes: dict = {"contents": {"validation": "other"}}
    monkeypatch.setattr(identity, "identity", lambda *given: found(*given) | changes)
    done = run(*evaluate)
    assert done.returncode == 2 and done.stderr == (
        "jdm eval: config.data.name='digits' is not what the model was trained on: validation has "
        "other images or labels; --other-data evaluates on it anyway\n"
    )
    assert run(*evaluate, "--other-data").returncode == 0
    changes = {"name": "letters", "class_names": [*"abcdefghij"]}  # as with --data=letters
    done = run(*evaluate)
    assert done.returncode == 2 and "class 0 was '0' and is 'a'; " in done.stderr
    assert done.stderr.endswith(" and 7 more; --other-data evaluates on it anyway\n")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("dog,none,2", [1, None, 2]),
        ("cat:0.5+2:0.5", [[0.5, 0, 0.5]]),
    ],
)
def test_labels_by_name(text, labels):
    found = cycled(parse_labels(text), len(labels), 3, False, ("cat", "dog", "sea-lion"))
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("dogs", ("cat", "dog"), "labels hold 'dogs'; the classes are cat, dog; did you mean dog?"),
        ("dog", (), "labels hold 'dog'; this model knows no names, its classes are numbers"),
        ("dog:0.5+1:0.5", ("cat", "dog"), "labels name a class twice in dog+1"),
    ],
)
def test_labels_by_a_wrong_name(text, names, said):
    with pytest.raises(InvalidValue) as info:
        cycled(parse_labels(text), 1, 2, False, names)
    assert str(info.value) == said


def test_attributes_by_name():
    found = cycled(parse_labels("hat+!tie"), 1, 2, True, ("hat", "tie"))
    assert found.tolist() == [[1, 0]]


def test_the_command_line_takes_the_names_of_the_model(run, tiny, tmp_path):
    done = run("sample", f"--checkpoint={tiny}", "--labels=x,7", cwd=tmp_path)
    said = "jdm sample: --labels hold 'x'; the classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_guidance_classifier_of_other_classes_is_a_warning(joint):
    request = dict(labels=[0], method=Method(guidance="pixel"))
    said = "the guidance classifier knows the classes cat, dog, 2, .*, and the model 0, 1, 2, "
    with pytest.warns(UserWarning, match=said):
        check_request(joint, classifier=named(joint, "cat", "dog"), **request)


def test_captions_are_the_names(joint, monkeypatch):
    request = check_request(named(joint, "cat"), labels=[0, 3], method=Method(guidance="pixel"))
    images = np.zeros((2, 8, 8, 1), np.uint8)
    samples = concatenate(request, {}, [Batch(images, np.array([0.5, 1], np.float32), None)])
    assert samples.class_names == ("cat", *DIGITS[1:])
    captions: list[str] = []
    monkeypatch.setattr(plot, "captioned", lambda x, given, columns: captions.extend(given) or b"")
    samples._repr_png_()
    assert captions == ["cat 50%", "3 100%"]


def test_a_long_name_is_cut_in_its_middle():
    """The picture becomes as wide as the captions, up to a limit."""

    image = np.zeros((1, 8, 8, 1), np.uint8)

    def width(caption):
        return Image.open(io.BytesIO(plot.captioned(image, [caption], 1))).width

    assert width("cat") == 72 + 12
    assert width("cat") < width("a name of some length") < width("a " * 500) < 220
