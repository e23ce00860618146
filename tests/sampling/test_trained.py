"""The packaged digits model: what is asked for is drawn, and an image comes back from its noise.

Seeds that nothing was tuned on; docs/results.md has the figures of a thousand.
"""

import subprocess
import sys

import numpy as np
import pytest

from jdm.analysis import metrics
from jdm.data.splits import load_split

SCRIPT = """
import sys
import numpy as np
import jdm
from jdm.data.splits import load_split

joint, images = jdm.load("digits"), {}
for guidance in ("pixel", "representation"):
    options = dict(labels=np.arange(256) % 10, seeds=range(9000, 9256), guidance=guidance)
    images[guidance] = jdm.sample(joint, sampler="ancestral", steps=10, **options).images
real = load_split("digits", "test")[0][:64]
noise = jdm.invert(joint, real, steps=100)
images["back"] = jdm.sample(joint, noise=noise, steps=100, threshold="none").images
np.savez(sys.argv[1], **images)
"""


@pytest.fixture(scope="module")
def images(optimised, tmp_path_factory):
    """Made by a process that compiles for speed."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    subprocess.run([sys.executable, "-c", SCRIPT, path], env=optimised, check=True)
    with np.load(path) as saved:
        return dict(saved)


# Of 256 samples, a share of 0.97 is missed by 0.03 at three standard errors.
@pytest.mark.parametrize(("guidance", "least"), [("pixel", 0.94), ("representation", 0.91)])
def test_ten_steps_draw_what_is_asked_for_like_the_real_ones(images, guidance, least):
    train, test = (load_split("digits", split) for split in ("train", "test"))
    labels = np.arange(256) % 10
    agreement = metrics.Judge(*train).agreement(images[guidance], labels)
    assert min(agreement.values()) >= least
    ratio = metrics.nearest_neighbour_ratio(train[0], test[0], images[guidance])
    assert 0.7 <= ratio["mean"] <= 1.3
    assert metrics.diversity_ratio(images[guidance], labels, *train)["mean"] >= 0.7


def test_a_hundred_steps_to_the_noise_and_back_keep_the_image(images):
    real = load_split("digits", "test")[0][:64]
    assert np.abs(images["back"].astype(float) - real).mean() < 2
