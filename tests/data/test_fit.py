"""jdm.data.fit: configs and labels that do not fit their data set are one sentence."""

from pathlib import Path

import numpy as np
import pytest

from jdm.config import load_config
from jdm.data import DataError
from jdm.data.fit import check_config_fits, check_labels, check_not_empty, evaluation_options
from jdm.data.records import check_prepared
from jdm.data.splits import ReadOptions
from jdm.errors import InvalidValue


def sections(**changes):
    """The sections data, model and eval of the config tiny, with changes."""
    config = load_config("tiny")
    with config.unlocked():
        for section, values in changes.items():
            config[section].update(values)
    return config.data, config.model, config.eval


def test_a_config_that_fits_yields_the_facts():
    assert check_config_fits(*sections()).splits == {"train": 1257, "validation": 180, "test": 360}
    data = dict(classes=(4, 2), unlabelled="mnist")
    assert check_config_fits(*sections(data=data, model=dict(num_classes=2))).name == "digits"


def test_the_config_in_the_docs_fits_its_folder(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (tmp_path / "pets.py").write_text(page.split("```python\n")[1].split("```")[0])
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.png").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config("pets.py")
    assert check_config_fits(config.data, config.model, config.eval).splits == {"train": 2}
    with pytest.raises(DataError, match="run jdm data prepare folder:pets$"):
        check_prepared(config.data.name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model=dict(num_classes=7)), "model.num_classes=7 does not fit .*'digits', .* 10$"),
        (dict(model=dict(multi_label=True)), "model.multi_label=True does not fit .*'digits'"),
        (dict(model=dict(image_size=16)), "model.image_size=16 does not fit .*, which has 8$"),
        (dict(model=dict(image_channels=3)), "model.image_channels=3 does not fit .* has 1$"),
        (
            dict(data=dict(classes=(1, 2, 3))),
            r"model.num_classes=10 .* which has 3 with config.data.classes=\(1, 2, 3\)$",
        ),
        (dict(data=dict(classes=(1, 10))), r"data.classes=\(1, 10\) must be .* from 0 to 9, the"),
        (dict(data=dict(name="mnist")), "model.image_size=8 .*'mnist', which has 28 or 32$"),
        (dict(data=dict(name="folder:/absent")), "data.name='folder:/absent' is not a folder$"),
        (dict(data=dict(unlabelled="folder:/absent")), "data.unlabelled='.*' is not a folder$"),
        (
            dict(
                data=dict(name="mnist", validation=0.0),
                model=dict(image_size=28),
                eval=dict(split="validation"),
            ),
            "eval.split='validation' does not exist: .*'mnist' has train, test; .*validation=0.0",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(changes, said):
    with pytest.raises(InvalidValue, match=f"^config.{said}") as info:
        check_config_fits(*sections(**changes))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("labels", "multi_label", "said"),
    [
        (np.array([0, 3, -1]), False, "does not allow the label 3, which"),
        (np.array([0, -2, 1]), False, "does not allow the label -2, which"),
        (np.array([[0, 1, 1], [0, 2, -1]]), True, "does not allow the label 2, which"),
        (np.array([0, 1, 1]), True, r"needs labels of the shape \(3, 3\), but .* \(3,\)$"),
        (np.array([[0, 1], [1, 1]]), True, r"needs labels of the shape \(2, 3\), but .* \(2, 2\)$"),
        (np.array([[0, 1, 1]]), False, r"needs labels of the shape \(1,\), but .* \(1, 3\)$"),
    ],
)
def test_labels_the_model_cannot_learn_are_one_sentence(labels, multi_label, said):
    model = f"config.model.num_classes=3 with config.model.multi_label={multi_label}"
    with pytest.raises(InvalidValue, match=f"^{model} {said}"):
        check_labels(labels, 3, multi_label)


def test_labels_that_the_model_can_learn():
    check_labels(np.array([0, 2, -1]), 3, False)
    check_labels(np.array([[0, 1, -1]], np.int8), 3, True)


def test_a_run_needs_training_images_and_labels_to_evaluate_on():
    data, _, evaluation = sections()
    images, unlabelled = np.zeros(3, np.int32), np.full(2, -1, np.int32)
    check_not_empty(unlabelled, images, data, evaluation)
    for train, evaluated in ((images[:0], images), (images, images[:0]), (images, unlabelled)):
        said = (
            f"^config.data.validation=0.05 leaves {len(train)} images to train on, and "
            rf"{len(evaluated)} images to evaluate on \(config.eval.split='validation'\);"
        )
        with pytest.raises(InvalidValue, match=said):
            check_not_empty(train, evaluated, data, evaluation)


def test_a_model_is_evaluated_on_its_own_data_set_and_on_others_of_its_classes():
    data, model, _ = sections(data=dict(dir="here", classes=(7, 2, 5), workers=2))
    model.num_classes = 3
    own = evaluation_options("digits", data, model)
    assert own == ReadOptions("here", 8, 1, (7, 2, 5), data.validation)
    # Another data set of ten classes: config.data.classes apply.
    assert evaluation_options("mnist", data, model, "there").classes == (7, 2, 5)
    # Another data set of the model's two classes: they are the model's classes.
    data, model, _ = sections(data=dict(classes=(7, 2)), model=dict(num_classes=2))
    assert evaluation_options("malaria", data, model).classes == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar100", "='cifar100' has 100 classes; this model knows 10 classes"),
        ("celeb_a", "='celeb_a' has 40 attributes; this model knows 10 classes"),
        ("mnits", "='mnits' is unknown; known: "),
    ],
)
def test_a_data_set_of_other_classes_is_one_sentence(name, said):
    with pytest.raises(InvalidValue, match=f"^config.data.name{said}"):
        evaluation_options(name, *sections()[:2])
