"""jdm.sample: seeds, batches, devices, programs, labels."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jdm
from jdm.diffusion.guidance import chosen
from jdm.diffusion.method import Method
from jdm.mesh import local_mesh
from jdm.sampling import programs
from jdm.sampling.request import Recipe


@pytest.mark.parametrize(
    ("sampler", "guidance", "sizes"), [("ddim", "pixel", [3]), ("ancestral", "none", [1, 3])]
)
@pytest.mark.filterwarnings("ignore:labels are given")
def test_same_seed_same_image_at_any_batch_size(
    joint, sampler, guidance, sizes, assert_same_images
):
    options = dict(seeds=range(8), labels=np.arange(8), steps=4, sampler=sampler, guidance=guidance)
    whole = jdm.sample(joint, **options, batch_size=8)
    for batch_size in sizes:
        fewer = jdm.sample(joint, **options, batch_size=batch_size)
        assert_same_images(whole.images, fewer.images)
    again = jdm.sample(joint, **options, batch_size=8)
    np.testing.assert_array_equal(whole.images, again.images)


def test_image_depends_on_its_seed_alone(joint):
    one = jdm.sample(joint, seeds=[5, 6, 7, 8], steps=4)
    other = jdm.sample(joint, seeds=[100, 6, 8, 2], steps=4)
    np.testing.assert_array_equal(one.images[[1, 3]], other.images[[1, 2]])  # the same padded shape
    assert (one.images[0] != one.images[1]).any()


EVALUATED = """
import jdm
from jdm.analysis.evaluators.likelihood import image_bounds
from jdm.analysis.logits import image_logits

def evaluated(joint, images):
    rows = dict(batch_size=6)
    bounds = image_bounds(joint, images, 2, **rows)
    return dict(
        classified=jdm.classify(joint, images, **rows),
        logits=image_logits(joint, images, t=5, **rows),
        features=jdm.features(joint, images, t=5, **rows).values,
        prior=bounds.prior,
        terms=bounds.terms,
    )
"""
EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jdm import mesh
from jdm.sampling import editing

assert jax.device_count() == 8
joint = jdm.load(sys.argv[1])
assert joint.mesh.size == 8
samples = jdm.sample(joint, seeds=range(20), labels=[3], guidance="representation", steps=3)

placed, on_devices = [], mesh.on_devices
mesh.on_devices = lambda *what: placed.append(on_devices(*what)) or placed[-1]
editing.on_devices = mesh.on_devices
some = jax.devices()[2:6]
joint = jdm.load(sys.argv[1], devices=some, mesh="fsdp")
share, whole = mesh.share_of_each(joint.weights)
assert share < 0.5 and whole, (share, whole)  # between two calls each device has a part
noise = jdm.invert(joint, samples.images, steps=3, iterations=2)
found = evaluated(joint, samples.images)
# 20 images at once; then 8 at a time, two on each device, in four evaluations.
assert [len(images) for images, *_ in placed] == [32] + [8] * 12
for x in jax.tree.leaves(placed):
    assert x.sharding.shard_shape(x.shape)[0] == len(x) // 4 and x.devices() == set(some)
np.savez(sys.argv[2], images=samples.images, noise=noise, **found)
"""


def test_eight_devices_and_four_of_them_give_the_images_the_noise_and_the_figures_of_one(
    tiny, joint, assert_same_images, tmp_path
):
    code = EVALUATED + EIGHT_DEVICES
    path = tmp_path / "eight.npz"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code, str(tiny), str(path)], env=env, check=True)
    one = jdm.sample(joint, seeds=range(20), labels=[3], guidance="representation", steps=3)
    with np.load(path) as eight:
        assert_same_images(eight["images"], one.images)
        noise = jdm.invert(joint, eight["images"], steps=3, iterations=2)
        np.testing.assert_allclose(eight["noise"], noise, atol=1e-4 * abs(noise).max())
        defined: dict = {}
        exec(EVALUATED, defined)
        for name, figures in defined["evaluated"](joint, eight["images"]).items():
            np.testing.assert_allclose(eight[name], figures, rtol=1e-4, atol=1e-5, err_msg=name)


def test_pixel_guidance_follows_the_classifier_it_is_given(joint, assert_same_images):
    options = dict(seeds=range(8), labels=[3], guidance="pixel", scale=50.0, steps=4)
    own = jdm.sample(joint, **options)
    again = jdm.sample(joint, classifier=joint, **options)
    assert_same_images(own.images, again.images)
    assert own.settings["classifier"] is None and again.settings["classifier"] == "a Joint"
    # Every logit turned round: another classifier on the same network.
    head = jax.tree.map(lambda x: -x, joint.params["head"]["out"])
    params = joint.params | {"head": joint.params["head"] | {"out": head}}
    other = dataclasses.replace(joint, weights=joint.weights | {"params": params})
    found = jdm.sample(joint, classifier=other, **options)
    assert (found.images != own.images).any()


def test_a_classifier_that_does_not_fit_is_refused(joint):
    longer = dataclasses.replace(joint, diffusion=dataclasses.replace(joint.diffusion, steps=100))
    with pytest.raises(ValueError, match=r"^classifier has the schedule \('linear', 100\); this"):
        jdm.sample(joint, labels=[1], guidance="pixel", classifier=longer)
    with pytest.raises(ValueError, match="^classifier goes with guidance pixel, not 'none'"):
        jdm.sample(joint, classifier=joint)


@contextlib.contextmanager
def compilations():
    """A list that holds the seconds of each program XLA compiles meanwhile."""
    found, listening = [], True

    def listen(event, seconds, **_):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    listening = False


def test_one_program_a_method_and_none_for_a_second_call(joint):
    """steps=6: no other test has made its programs."""
    options = dict(guidance="pixel", steps=6)
    jdm.sample(joint, 8, labels=[1], **options)
    with compilations() as again:
        jdm.sample(joint, 8, labels=[2, None] * 4, scale=3.0, seeds=range(50, 58), **options)
        jdm.sample(joint, 7, labels=[np.full(10, 0.1)], **options)  # padded to 8
    assert again == []
    with compilations() as new:
        jdm.sample(joint, 8, labels=[1], **options, spacing="quadratic")
    assert len(new) == 1


def test_scale_zero_is_no_guidance(joint, assert_same_images):
    options = dict(steps=4, sampler="ancestral")
    plain = jdm.sample(joint, 4, **options)
    for guidance in ("pixel", "representation"):
        zero = jdm.sample(joint, 4, labels=[1], guidance=guidance, scale=0.0, **options)
        assert_same_images(plain.images, zero.images)


# Labels ------------------------------------------------------------------------------------------


def test_guided_and_unguided_images_in_one_batch(joint, assert_same_images):
    options = dict(steps=4, scale=6.0, guidance="representation", sampler="ddim")
    mixed = jdm.sample(joint, labels=[3, None, 3, -1], **options)
    guided = jdm.sample(joint, labels=[3] * 4, **options)
    plain = jdm.sample(joint, 4, steps=4)
    assert_same_images(mixed.images[::2], guided.images[::2])
    assert_same_images(mixed.images[1::2], plain.images[1::2])
    assert (guided.images[1::2] != plain.images[1::2]).any()
    assert list(mixed.labels) == [3, -1, 3, -1]
    assert np.isnan(mixed.probabilities).tolist() == [False, True, False, True]


def test_a_certain_distribution_is_a_class(joint, assert_same_images):
    options = dict(steps=4, guidance="pixel", scale=50.0)
    one = jdm.sample(joint, labels=[3] * 4, **options)
    certain = jdm.sample(joint, labels=np.eye(10)[[3] * 4], **options)
    assert_same_images(one.images, certain.images)
    half = jdm.sample(joint, labels=np.eye(10)[[3] * 4] / 2 + np.eye(10)[[5] * 4] / 2, **options)
    assert (half.images != one.images).any()
    assert half.labels.shape == (4, 10) and half.labels.dtype == np.float32


def test_probabilities_are_those_of_the_finished_images(joint):
    samples = jdm.sample(joint, labels=[3, 4, 5, None], guidance="pixel", steps=4)
    found = jdm.classify(joint, samples.images)
    np.testing.assert_allclose(samples.probabilities[:3], found[[0, 1, 2], [3, 4, 5]], rtol=1e-4)
    assert jdm.sample(joint, 4, steps=4).probabilities is None


def test_any_set_of_attributes_of_a_multi_label_model(joint, assert_same_images):
    several = dataclasses.replace(joint, model=joint.model.clone(multi_label=True))
    asked = np.full((4, 10), -1)
    asked[0, [2, 7]] = 1, 0
    asked[1, 2] = 1
    asked[2, 2] = 0
    samples = jdm.sample(several, labels=asked, guidance="pixel", scale=30.0, steps=4)
    found = jdm.classify(several, samples.images)
    expected = [found[0, 2] * (1 - found[0, 7]), found[1, 2], 1 - found[2, 2]]
    np.testing.assert_allclose(samples.probabilities[:3], expected, rtol=1e-3)
    assert np.isnan(samples.probabilities[3])  # nothing was asked
    # On and off pull apart, each from where it would be without.
    plain = jdm.sample(several, labels=np.full((4, 10), -1), guidance="pixel", scale=30.0, steps=4)
    before = jdm.classify(several, plain.images)
    assert found[1, 2] > before[1, 2] and found[2, 2] < before[2, 2]
    assert_same_images(samples.images[3], plain.images[3])


def test_an_image_that_is_not_finite_is_not_returned(joint):
    wild = dict(guidance="published", scale=1e38, threshold="none", steps=4)
    with pytest.raises(FloatingPointError, match="^the image of seed 7 is not finite; .* 1e.38"):
        jdm.sample(joint, labels=[None, 1], seeds=[5, 7], **wild)


# Memory ------------------------------------------------------------------------------------------


class Need:
    """A program that needs so many bytes for each image."""

    def __init__(self, rows: int, each: int):
        self.rows, self.need = rows, rows * each

    def memory_analysis(self):
        return SimpleNamespace(
            argument_size_in_bytes=0,
            output_size_in_bytes=self.need // 2,
            temp_size_in_bytes=self.need // 2,
        )


@pytest.mark.parametrize(
    ("n", "batch_size", "each", "rows"),
    [
        (1000, None, 10, 64),  # as many as are of use on a CPU
        (1000, 16, 10, 16),
        (5, None, 10, 8),  # a power of two
        (5, 3, 10, 3),
        (1000, None, 40, 16),  # of what fits in 1000 bytes the power of two
        (1000, 24, 50, 8),
        (1000, None, 1000, 1),
    ],
)
def test_batches_are_as_large_as_is_of_use_and_fits(n, batch_size, each, rows, monkeypatch):
    monkeypatch.setattr(programs, "free_memory", lambda device: 1000)
    compiled = []

    def compile_for(rows):
        compiled.append(rows)
        return Need(rows, each)

    found, program = programs.fitting(n, local_mesh(), batch_size, compile_for)
    assert found == program.rows == rows
    assert len(compiled) <= 2 and program.need <= 1000


def test_a_compiler_that_refuses_what_does_not_fit_is_asked_for_less(monkeypatch):
    def compile_for(rows):
        if rows > most:
            raise jax.errors.JaxRuntimeError(error)
        return Need(rows, 10)

    monkeypatch.setattr(programs, "free_memory", lambda device: 2**20)
    most, error = 16, "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."
    assert programs.fitting(1000, local_mesh(), None, compile_for)[0] == 16
    most = 0
    with pytest.raises(MemoryError, match="^batch_size=1 needs more than there is on each device"):
        programs.fitting(1000, local_mesh(), None, compile_for)
    error = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        programs.fitting(1000, local_mesh(), None, compile_for)


def test_an_image_that_does_not_fit_is_one_sentence(monkeypatch):
    monkeypatch.setattr(programs, "free_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match="^batch_size=1 needs 2 MiB on each device, and only 1 M"):
        programs.fitting(100, local_mesh(), None, lambda rows: Need(rows, 2**21))


def test_a_program_accounts_for_more_memory_at_larger_batches(joint):
    def need(rows):
        recipe, mesh = Recipe(chosen(Method(steps=4), labelled=False)), local_mesh()
        program = programs.compile_sampler(joint.model, None, joint.diffusion, recipe, mesh, rows)
        return programs.needed(program)

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(joint.weights))
    assert weights < need(4) < need(8)
    assert need(8) < programs.free_memory(jax.devices()[0])
