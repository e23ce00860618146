"""`--profile` of jdm train and jdm sample: a trace that profilers read, and the same results."""

import json

import jax
import numpy as np
import pytest

from jdm import profiling


def events(folder):
    """[(name, {statistic: value})] of all events of the one trace in the folder."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    found = [event for plane in planes for line in plane.lines for event in line.events]
    return [(event.name, dict(event.stats)) for event in found]


def traced_steps(folder):
    return sorted(stats["step_num"] for name, stats in events(folder) if name == "train")


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_training_writes_a_trace_of_its_last_steps_and_trains_the_same(run, tmp_path):
    train = ["train", "--config=tiny", "--config.eval.every=0", "--config.checkpoint.every=0"]
    train += ["--config.model.multipliers=(1,)", "--config.model.attention=()"]  # compiled sooner
    plain, traced, folder = (tmp_path / name for name in ("plain", "traced", "trace"))
    assert run(*train, f"--workdir={plain}").returncode == 0
    done = run(*train, f"--workdir={traced}", f"--profile={folder}")
    assert done.returncode == 0, done.stderr
    assert f"wrote a trace of steps 3 to 4 to {folder}" in done.stdout
    assert traced_steps(folder) == [3, 4]
    assert losses(traced) == losses(plain)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(1, 30, [3, 4, 5, 6, 7]), (21, 30, [23, 24, 25, 26, 27]), (9, 9, [9])],
)
def test_the_steps_that_are_traced(first, last, expected, tmp_path):
    folder = tmp_path / "trace"
    with profiling.StepTrace(folder, first, last) as traced:
        for number in range(first, last + 1):
            with traced.step(number) as results:
                results.append(jax.numpy.ones(3) * number)
    assert traced_steps(folder) == expected


def test_sampling_writes_a_trace_and_the_same_images(run, tiny, tmp_path):
    sample = ["sample", f"--checkpoint={tiny}", "--seeds=0-2", "--steps=2"]
    folder, images = tmp_path / "trace", []
    for flags in ([], [f"--profile={folder}"]):
        out = tmp_path / f"{len(flags)}.npz"
        done = run(*sample, f"--out={out}", *flags)
        assert done.returncode == 0, done.stderr
        with np.load(out) as saved:
            images.append(saved["arr_0"])
    assert f"wrote a trace of 3 images to {folder}" in done.stdout
    np.testing.assert_array_equal(*images)
    assert len(events(folder)) > 100


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_folder_with_something_in_it_is_refused_before_any_work(command, run, tmp_path):
    (tmp_path / "thesis.txt").touch()
    flags = {
        "train": ["--config=tiny", f"--workdir={tmp_path}/run"],
        "sample": ["--checkpoint=digits", f"--out={tmp_path}/out.png"],
    }
    done = run(command, *flags[command], f"--profile={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--profile='{tmp_path}' exists and is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_dry_run_has_no_step_to_trace(run, tmp_path):
    flags = ["--config=tiny", "--dry-run", f"--workdir={tmp_path}/run", f"--profile={tmp_path}/new"]
    done = run("train", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not go with dry_run" in done.stderr and not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(command, run, tmp_path):
    (tmp_path / "file").touch()
    flags = {
        "train": ["--config=tiny", f"--workdir={tmp_path}/run"],
        "sample": ["--checkpoint=digits", f"--out={tmp_path}/out.png"],
    }
    done = run(command, *flags[command], f"--profile={tmp_path}/file/new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--profile='{tmp_path}/file/new' cannot be written: Not a directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
