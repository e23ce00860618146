"""jdm.diffusion.samplers.timesteps: which times are visited, against the published rule."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.diffusion.process import Diffusion
from jdm.diffusion.samplers import SPACINGS, timesteps


@functools.cache
def chain(total: int, schedule: str = "cosine") -> Diffusion:
    return Diffusion(total, schedule)  # cosine: any T is valid


# The quantity in which the times of each spacing are evenly spaced, defined independently.
MEASURES = {
    "uniform": lambda diffusion: np.arange(diffusion.steps),
    "quadratic": lambda diffusion: np.arange(diffusion.steps) ** 0.5,
    "log_snr": lambda diffusion: np.log(1 / diffusion.abar - 1),
}


@st.composite
def chains(draw):
    """(total, schedule) of a Diffusion of 2 to 4000 times."""
    total = draw(st.integers(2, 4000))
    return total, draw(st.sampled_from(["cosine", "linear"] if total > 20 else ["cosine"]))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(SPACINGS)))
def test_timesteps_run_strictly_down_from_the_last_time_to_zero(data, spacing):
    diffusion = chain(*data.draw(chains()))
    left = data.draw(st.integers(2, diffusion.steps))
    steps = data.draw(st.integers(2, left) | st.just(left))
    times = timesteps(diffusion, steps, spacing, left)
    assert times.dtype == np.int32 and len(times) == steps
    assert times[0] == left - 1 and times[-1] == 0
    assert np.all(np.diff(times) < 0)
    if spacing == "uniform":
        assert np.ptp(np.diff(times)) <= 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_is_at_the_noisiest_time_and_as_many_as_there_are_visit_all(spacing):
    for total in (1, 2, 3, 50):
        assert timesteps(chain(total), 1, spacing).tolist() == [total - 1]
        assert timesteps(chain(total), total, spacing).tolist() == [*range(total)][::-1]
    assert timesteps(chain(50), 1, spacing, total=7).tolist() == [6]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(MEASURES)))
def test_each_time_is_the_nearest_one_where_those_differ(data, spacing):
    diffusion = chain(*data.draw(chains()))
    steps = data.draw(st.integers(2, min(diffusion.steps, 20)))
    measure = MEASURES[spacing](diffusion)
    places = np.linspace(measure[-1], measure[0], steps)
    distances = np.abs(places[:, None] - measure)
    nearest = distances.argmin(axis=1)
    times = timesteps(diffusion, steps, spacing)
    if len(set(nearest)) == steps:  # an exact half may be rounded either way
        ours = distances[np.arange(steps), times]
        np.testing.assert_allclose(ours, distances.min(axis=1), rtol=1e-6, atol=1e-9)
    else:  # the others move toward the noise, except where no time is free at that end
        room = np.arange(steps)[::-1]
        assert np.all((times >= nearest) | (times == diffusion.steps - steps + room))


@pytest.mark.parametrize("total, steps", [(1000, 10), (1000, 31), (4000, 50)])
def test_quadratic_times_are_squares(total, steps):
    squares = (total - 1) * np.linspace(1, 0, steps) ** 2  # Song et al. 2021, appendix D.2
    assert np.abs(timesteps(chain(total), steps, "quadratic") - squares).max() < 1


def test_log_snr_times_are_evenly_spaced_in_it():
    diffusion = chain(100_000, "linear")
    times = timesteps(diffusion, 20, "log_snr")
    gaps = np.diff(np.log(1 / diffusion.abar[times] - 1))
    # Below t = 100, neighbouring times are too far apart in it to be evenly spaced.
    assert np.ptp(gaps[:-6]) < 1e-3 * -gaps.mean() and np.ptp(gaps) < 0.1 * -gaps.mean()


def test_times_that_would_coincide_make_room_for_each_other():
    # sqrt(9) · [0, 1/7, ..., 1] is nearest to the roots of 0, 0, 1, 2, 3, 5, 7, 9.
    assert timesteps(chain(10), 8, "quadratic").tolist() == [9, 7, 5, 4, 3, 2, 1, 0]
    # The last of the cosine's betas is 0.999, a large step in log SNR: nearest are 9, 9, 8, 8, 6,
    # 2, 0. They move toward the noise while there are free times, and then toward the image.
    assert timesteps(chain(10), 7, "log_snr").tolist() == [9, 8, 7, 6, 5, 2, 0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_total_is_a_chain_that_ends_earlier(spacing):
    times = timesteps(chain(1000), 12, spacing, total=400)
    assert times[0] == 399 and times[-1] == 0
    measure = MEASURES[spacing](chain(1000))[times]
    gaps = -np.diff(measure)
    assert gaps[:6].max() < 1.05 * gaps[:6].min()
    assert np.array_equal(
        timesteps(chain(1000), 12, spacing, 1000), timesteps(chain(1000), 12, spacing)
    )


# Section counts, and the published rule.


def respaced(total: int, counts: list[int]) -> list[int]:
    """The published rule, as a loop over sections and times."""
    times, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        position = 0.0
        for _ in range(count):
            times.append(start + round(position))  # halves to even
            position += (size - 1) / (count - 1) if count > 1 else 1
        start += size
    return times


@pytest.mark.parametrize("total", [7, 24, 50, 100, 128, 500, 1000, 4000])
def test_timesteps_are_those_of_the_published_respacing(total):
    for steps in range(
        2, min(total, 300) + 1
    ):  # 24, 15: a half, rounded down because strides are summed
        assert timesteps(chain(total), steps)[::-1].tolist() == respaced(total, [steps])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_section_counts_are_those_of_the_published_respacing(data):
    sections = data.draw(st.integers(2, 6))
    total = data.draw(st.integers(sections, 2000))
    counts = data.draw(
        st.lists(st.integers(1, total // sections), min_size=sections, max_size=sections)
    )
    steps = ",".join(map(str, counts))
    times = timesteps(chain(total), steps)
    assert times.dtype == np.int32 and times[::-1].tolist() == respaced(total, counts)
    assert timesteps(chain(2000), steps, total=total).tolist() == times.tolist()


def test_section_counts_by_hand():
    assert timesteps(chain(12), "1,2,4").tolist() == [11, 10, 9, 8, 7, 4, 0]
    assert timesteps(chain(10), "2,2,2").tolist() == [9, 7, 6, 4, 3, 0]  # the first is longer
    assert timesteps(chain(100), "20").tolist() == timesteps(chain(100), 20).tolist()


# Errors.


@pytest.mark.parametrize(
    "steps, sentence",
    [
        ("10,60", r"^steps='10,60' asks for 60 of the 50 times of a section; .*steps=100$"),
        ("10,0", r"^steps='10,0' asks for 0 of the 50 times of a section"),
        ("10,", r"^steps='10,' must be a whole number, or section counts such as 10,10,20$"),
        ("ddim50", r"^steps='ddim50' must be a whole number"),
        ("101", r"^steps='101' must lie between 1 and diffusion\.steps=100$"),
        (101, r"^steps=101 must lie between 1 and diffusion\.steps=100$"),
        (0, r"^steps=0 must lie between 1 and diffusion\.steps=100$"),
        (-1, r"^steps=-1 must lie between 1 and diffusion\.steps=100$"),
    ],
)
def test_counts_out_of_range_are_one_sentence(steps, sentence):
    for spacing in SPACINGS if "," not in str(steps) else ["uniform"]:
        with pytest.raises(ValueError, match=sentence):
            timesteps(chain(100), steps, spacing)


@pytest.mark.parametrize(
    "steps, sentence",
    [
        (41, r"^steps=41 must lie between 1 and the times that are left, 40$"),
        ("5,30", r"^steps='5,30' asks for 30 of the 20 times .* of the times that are left, 40$"),
    ],
)
def test_counts_that_a_shorter_chain_cannot_hold_name_its_length(steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        timesteps(chain(100), steps, total=40)


@pytest.mark.parametrize("spacing", ["quadratic", "log_snr"])
def test_section_counts_are_uniform(spacing):
    sentence = rf"^steps='5,5' has section counts, which spacing='{spacing}' does not take; take "
    with pytest.raises(ValueError, match=sentence):
        timesteps(chain(100), "5,5", spacing)


def test_an_unknown_spacing_is_one_sentence_that_lists_the_known():
    sentence = "^spacing='karras' is unknown; known: uniform, quadratic, log_snr$"
    for steps in (1, 10, "5,5"):
        with pytest.raises(ValueError, match=sentence):
            timesteps(chain(100), steps, "karras")


@pytest.mark.parametrize("total", [0, -3, 101])
def test_a_total_beyond_the_chain_is_an_error(total):
    sentence = f"^total={total} must lie between 1 and diffusion.steps=100$"
    for steps in (1, "1,1"):
        with pytest.raises(ValueError, match=sentence):
            timesteps(chain(100), steps, total=total)
