"""jdm.explain: the mask, the search, what is refused, and what is written."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jdm
from jdm.analysis.explain import counterfactuals, figure
from jdm.analysis.explain.explanations import ALREADY, KEPT, UNLIKE, shown_in
from jdm.analysis.explain.program import (
    COPIES,
    STRIDE,
    Denoiser,
    largest,
    noised_probabilities,
)
from jdm.analysis.explain.search import noise_seeds, search
from jdm.analysis.explain_options import ExplainOptions
from jdm.analysis.reference import ReferenceClassifiers
from jdm.data.splits import load_split
from jdm.diffusion.method import Method
from jdm.diffusion.process import to_floats
from jdm.diffusion.samplers import image_noise
from jdm.errors import InvalidValue
from jdm.numerics import key_of

QUICK = dict(steps=2, draws=2, strengths=(0.5, 1.0), again=0.0, confidence=0.0, scale=10.0)


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


@pytest.fixture(scope="module")
def train():
    return load_split("digits", "train").images


@pytest.fixture(scope="module")
def images(train):
    return train[:3]


def others(joint, images) -> list[int]:
    """For each image a class that the model does not see in it."""
    return ((jdm.classify(joint, images).argmax(axis=1) + 1) % 10).tolist()


@pytest.fixture(scope="module")
def found(joint, images, train):
    """Two counterfactuals of three images, for which the untrained model needs no confidence."""
    seen = jdm.classify(joint, images)
    target = seen.argsort(axis=1)[:, -2].tolist()  # the second most probable
    return jdm.explain(joint, images, target, seeds=[0, 1], training_images=train, **QUICK)


def test_the_mask_holds_the_largest_values():
    values = jnp.arange(8.0).reshape(2, 2, 2)
    mask = np.asarray(largest(values, jnp.array([0.5, 0.01])))[..., 0]
    assert mask.tolist() == [[[False, False], [True, True]], [[False, False], [False, True]]]


def test_outside_the_mask_an_image_stays_as_it_was(joint, images):
    region = np.zeros((1, 8, 8, 1), bool)
    region[:, :4] = True
    method = Method(sampler="ddim", steps=2, guidance="pixel", threshold="static")
    denoise = Denoiser(joint, method, 4, masked=True, region=region, batch_size=4)
    targets = np.eye(10, dtype=np.float32)[[1, 2, 3]]
    changed = denoise(images, np.arange(3), targets, 0.9, 4.0)
    assert (changed[:, 4:] == images[:, 4:]).all() and (changed[:, :4] != images[:, :4]).any()
    few = denoise(images, np.arange(3), targets, 0.9, 4.0, np.full(3, 1 / 64))
    assert ((few != images).reshape(3, -1).sum(axis=1) <= 1).all()


@pytest.mark.parametrize("start", ["noise", "inversion"])
def test_a_counterfactual_depends_on_its_own_seed_alone(joint, images, start):
    method = Method(sampler="ddim", steps=2, guidance="pixel", threshold="static")
    denoise = Denoiser(joint, method, 4, start=start, batch_size=4)
    targets = np.eye(10, dtype=np.float32)[[1, 2, 3]]
    whole = denoise(images, np.array([5, 6, 7]), targets, 0.5, 4.0)
    alone = denoise(images[1:2], np.array([6]), targets[1:2], 0.5, 4.0)
    assert np.abs(whole[1].astype(int) - alone[0]).max() <= 1


def test_the_noise_is_that_of_the_image_and_the_seed(joint, found, images, train):
    seeds = noise_seeds(images[[0, 0, 1, 0]], np.array([7, 8, 7, 7], np.uint32))
    assert len(set(seeds.tolist())) == 3 and seeds[0] == seeds[3]
    target = int(found.targets[2])
    alone = jdm.explain(joint, images[1:2], target, seeds=[0, 1], training_images=train, **QUICK)
    assert np.abs(alone.after.astype(int) - found.after[2:4]).max() <= 1


class Painter:
    """Stands for a Denoiser: paints an image with its strength, in hundredths."""

    def __call__(self, images, seeds, targets, strength, scale=0.0, shares=None):
        return np.full_like(images, round(100 * strength) if scale else 1)


def searched(images, options, todo, shows, convinces, painter=None):
    """search() with a Painter, of images with the seeds 0, 1, …"""
    painter = painter or Painter()
    whole = images, np.arange(len(images)), np.eye(len(images)), np.array(todo)
    return search(painter, Painter(), options, 1.0, *whole, shows, convinces)


def test_the_search_takes_the_first_strength_that_flips():
    images = np.zeros((4, 2, 2, 1), np.uint8)
    needed = np.array([20, 30, 99, 20])  # the least strength at which the target is seen
    options = ExplainOptions(strengths=(0.2, 0.3, 0.4), again=0.1)

    def convinces(changed, rows, seeds):
        return changed[:, 0, 0, 0] >= needed[rows]

    todo = [True, True, True, False]
    result = searched(images, options, todo, lambda x, rows: x[:, 0, 0, 0] == 1, convinces)
    np.testing.assert_array_equal(result.strength, [0.2, 0.3, np.nan, np.nan])
    assert result.after[:, 0, 0, 0].tolist() == [20, 30, 0, 0]
    assert result.film[:, 1, 0, 0, 0].tolist() == [0, 20, 30, 30]
    assert result.film[:, 2, 0, 0, 0].tolist() == [0, 0, 0, 0]
    assert result.control[:, 0, 0, 0].tolist() == [1, 1, 0, 0]
    assert result.still.tolist() == [True, True, False, False]


def test_a_change_that_does_not_last_is_not_taken():
    last = []

    def convinces(changed, rows, seeds):
        last.append(changed[0, 0, 0, 0])
        return np.ones(len(rows), bool)

    def lasts(again, rows):
        return np.full(len(rows), last[-1] == 30)

    options = ExplainOptions(strengths=(0.2, 0.3), again=0.1)
    images = np.zeros((1, 2, 2, 1), np.uint8)
    assert searched(images, options, [True], lasts, convinces).strength == [0.3]


def test_of_the_draws_that_flip_the_nearest_is_taken():
    class Draws(Painter):
        """Paints the three draws of a seed with 30, 10 and 20."""

        def __call__(self, images, seeds, targets, strength, scale=0.0, shares=None):
            draws = [(seeds - k * STRIDE) % 2**32 < 10 for k in range(3)]
            painted = np.select(draws, [30, 10, 20]).astype(np.uint8)
            return np.ones_like(images) * painted[:, None, None, None]

    def convinces(changed, rows, seeds):  # the nearest draw of the second image does not flip
        return (rows == 0) | (changed[:, 0, 0, 0] > 10)

    options = ExplainOptions(strengths=(0.2, 0.3), draws=3, again=0.0)
    images = np.zeros((2, 2, 2, 1), np.uint8)
    always = lambda x, rows: np.ones(len(rows), bool)  # noqa: E731
    result = searched(images, options, [True, True], always, convinces, Draws())
    assert result.draw.tolist() == [1, 2] and result.strength.tolist() == [0.2, 0.2]
    assert result.after[:, 0, 0, 0].tolist() == [10, 20]
    assert result.film[:, 1, 0, 0, 0].tolist() == [0, 20, 20]


def test_the_noised_probabilities_are_means_over_noises_of_the_images_own(joint, images):
    seeds, t = np.array([3, 4, 5]), 20
    found = noised_probabilities(joint, images, seeds, t, 4)
    alone = noised_probabilities(joint, images[1:2], seeds[1:2], t, 4)
    np.testing.assert_allclose(alone, found[1:2], rtol=1e-5)
    x0, level, rows = to_floats(images), jnp.full(3, t), []
    for copy in range(COPIES):
        keys = key_of((seeds + copy * STRIDE) % 2**32)
        noise = image_noise(keys, joint.diffusion.steps, joint.image_shape)
        logits = joint.logits(joint.diffusion.q_sample(x0, level, noise), level)
        rows.append(jax.nn.softmax(logits))
    np.testing.assert_allclose(found, np.mean(rows, axis=0), rtol=1e-4)


def test_noised_copies_are_asked_about_where_there_is_a_mask(joint, images, train, monkeypatch):
    options = [{}, dict(shares=(0.5, 1.0)), dict(noised=0.5), dict(shares=(0.5,), noised=0.0)]
    assert [ExplainOptions(**one).noised_confidence for one in options] == [0, 0.95, 0.5, 0]
    target, never = others(joint, images), np.zeros((30, 10), np.float32)
    name = "noised_probabilities"
    monkeypatch.setattr(counterfactuals, name, lambda joint, x, *rest: never[: len(x)])
    given = QUICK | dict(confidence=0.01, training_images=train)
    assert jdm.explain(joint, images, target, **given).valid.any()
    assert not jdm.explain(joint, images, target, noised=0.1, **given).valid.any()


def test_targets_of_attributes_are_seen_one_by_one():
    probabilities = np.array([[0.9, 0.2, 0.6], [0.9, 0.6, 0.6]])
    targets = np.array([[1, 0, -1], [1, 0, -1]])
    assert shown_in(probabilities, targets).tolist() == [True, False]
    assert shown_in(probabilities, targets, 0.85).tolist() == [False, False]
    assert shown_in(probabilities, np.array([0, 1])).tolist() == [True, False]


def test_rows_are_images_by_seeds_and_figures_are_those_of_the_arrays(joint, found, images):
    assert found.images.tolist() == [0, 0, 1, 1, 2, 2] and found.seeds.tolist() == [0, 1] * 3
    change = found.after.astype(float) / 255 - images[found.images] / 255.0
    np.testing.assert_allclose(found.l1, np.abs(change).sum(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.l2, np.sqrt((change**2).sum(axis=(1, 2, 3))), rtol=1e-5)
    shown = jdm.classify(joint, found.after, batch_size=64).argmax(axis=1) == found.targets
    assert (shown[found.valid]).all() and found.valid.any()
    for row, reason in enumerate(found.reasons):
        assert reason in ("", KEPT)
        assert reason == "" or (found.after[row] == found.before[row]).all()
    assert found.summary()["valid"] == found.valid.mean()


def test_the_fitted_reference_classifier_is_that_of_the_evaluation(joint, found, images, train):
    split = load_split("digits", "train")
    svc = ReferenceClassifiers(split.images, split.labels).predictors["svc"]
    target = found.targets[::2].tolist()
    again = jdm.explain(joint, images, target, reference="fitted", training_images=train, **QUICK)
    np.testing.assert_array_equal(again.reference_before.argmax(axis=1), svc(again.before))
    np.testing.assert_array_equal(again.reference_after.argmax(axis=1), svc(again.found.after))
    assert again.settings["reference"] == "fitted"


def test_an_image_unlike_the_training_images_is_left_as_it_is(joint, train):
    noise = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1)).astype(np.uint8)
    same = np.repeat(train[:1], 20, axis=0)  # from which everything else is far
    odd = jdm.explain(joint, noise, others(joint, noise), training_images=same, **QUICK)
    assert odd.reasons == (UNLIKE,) and (odd.after == noise).all()
    assert odd.summary()["searched"] == 0


def test_an_image_that_shows_the_target_is_said_to(joint, images, train):
    seen = jdm.classify(joint, images).argmax(axis=1)
    mixed = [int(seen[0]), *others(joint, images[1:])]
    result = jdm.explain(joint, images, mixed, training_images=train, **QUICK)
    assert result.reasons[0] == ALREADY and ALREADY not in result.reasons[1:]


def test_what_is_added_and_removed_has_its_colour():
    before, after = np.full((4, 4, 1), 200, np.uint8), np.full((4, 4, 1), 200, np.uint8)
    before[1, 1], after[2, 2] = 20, 20  # a dark spot goes, another one comes
    change = figure.signed_change(before, after)
    assert change[2, 2] > 0.5 and change[1, 1] < -0.5 and change[0, 0] == 0
    colours = figure.change_map(before, after)
    assert colours[2, 2, 0] > colours[2, 2, 2] and colours[1, 1, 2] > colours[1, 1, 0]
    assert (colours[0, 0] == 255).all()


def test_a_folder_holds_figures_films_and_numbers(found, tmp_path):
    found.save(tmp_path / "why")
    names = {path.name for path in (tmp_path / "why").iterdir()}
    assert {"000000.png", "000005.gif", "explanations.csv", "summary.json", "summary.png"} <= names
    rows = list(csv.DictReader((tmp_path / "why" / "explanations.csv").open()))
    assert [row["seed"] for row in rows] == ["0", "1"] * 3
    assert json.loads((tmp_path / "why" / "summary.json").read_text())["summary"] == found.summary()
    found.save(tmp_path / "why.npz")
    with np.load(tmp_path / "why.npz") as stored:
        np.testing.assert_array_equal(stored["after"], found.after)
    with pytest.raises(InvalidValue, match="exists and is not empty"):
        found.save(tmp_path / "why")
    with pytest.raises(InvalidValue, match="cannot be written: the folder .* does not exist"):
        found.save(tmp_path / "none" / "why.png")
    with pytest.raises(InvalidValue, match="must end in .png or .npz, or be a new folder"):
        found.save(tmp_path / "why.gif")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(target=10), "^target=10 is no class; the classes are 0 to 9"),
        (dict(target="ten"), "^target='ten' is no class"),
        (dict(target=[1, 2]), r"^target=\[1, 2\] has 2 entries for 3 images"),
        (dict(strengths=(0.5, 0.2)), "^strengths=.* must be one or more shares .* rising order"),
        (dict(start="image"), "^start='image' is unknown; known: noise, inversion"),
        (dict(region=np.ones((4, 4), bool)), r"^region is bool\(4, 4\); bool of the shape"),
        (dict(region=np.zeros((8, 8), bool)), "^region has no pixel that may change"),
        (dict(steps=9, strengths=(0.1,)), "^steps=9 must .* 5; 0.1 of T=50 are 5"),
        (dict(steps="1,9"), "^steps='1,9' asks for 9 .*; 0.2 of T=50 are 10"),
        (
            dict(guidance="none"),
            "^guidance='none' leads to no target; a counterfactual needs pixel",
        ),
        (dict(images=np.zeros((0, 8, 8, 1), np.uint8)), "^images are none"),
        (dict(images=np.zeros((1, 9, 9, 1), np.uint8)), "^images have the shape"),
    ],
)
def test_wrong_values_are_one_sentence(joint, images, wrong, said):
    given = dict(images=images, target=3) | wrong
    with pytest.raises(InvalidValue, match=said):
        jdm.explain(joint, given.pop("images"), given.pop("target"), **given)


def test_a_target_that_all_images_show_is_refused_before_long_work(
    joint, images, train, monkeypatch
):
    monkeypatch.setattr(counterfactuals, "make_reference", lambda *_: pytest.fail("was fitted"))
    seen, given = jdm.classify(joint, images).argmax(axis=1).tolist(), QUICK
    with pytest.raises(InvalidValue, match="^target=.* is what the model sees already"):
        jdm.explain(joint, images, seen, reference="fitted", training_images=train, **given)


def test_noised_copies_need_a_classifier_that_knows_them(joint, images):
    config = joint.config.copy_and_resolve_references()
    config.loss.classify = "clean"
    clean = dataclasses.replace(joint, config=config)
    with pytest.raises(InvalidValue, match="^noised=0.5 needs a classifier that was trained on n"):
        jdm.explain(clean, images, 3, steps=2, noised=0.5)


@pytest.mark.parametrize(
    ("start", "sampler", "draws"),
    [("noise", "ddim", 2), ("inversion", "ddim", 1), ("inversion", "ancestral", 2)],
)
def test_an_image_is_inverted_once(joint, images, train, monkeypatch, start, sampler, draws):
    class Searched(Exception):
        pass

    def search(guided, unguided, options, *rest):
        raise Searched(options.draws)

    monkeypatch.setattr(counterfactuals, "search", search)
    given = QUICK | dict(start=start, sampler=sampler, training_images=train)
    with pytest.raises(Searched, match=f"^{draws}$"):
        jdm.explain(joint, images, others(joint, images), **given)


def test_the_command_reads_a_picture_and_writes_a_figure(tiny, images, joint, run, tmp_path):
    Image.fromarray(images[0, ..., 0]).resize((64, 64)).save(tmp_path / "digit.png")
    target = others(joint, images)[0]
    flags = ["--steps=2", "--strengths=0.5,1", "--again=0", "--confidence=0", f"--target={target}"]
    command = ["explain", f"--checkpoint={tiny}", "--images=digit.png", "--out=why.png", *flags]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout and Image.open(tmp_path / "why.png").size[0] > 500
    wrong = run(*command[:-5], "--images=none.png", f"--target={target}", cwd=tmp_path)
    assert wrong.returncode == 2 and "--images='none.png' is neither a file" in wrong.stderr
    (tmp_path / "text.png").write_text("text")
    drawn = run(*command, "--region=text.png", cwd=tmp_path)
    assert drawn.returncode == 2 and "--region='text.png' cannot be decoded" in drawn.stderr
