"""Outputs that are closed, full, gone or in ASCII: a run goes on, and a lost result is an error."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdm import messages
from jdm.cli import main
from jdm.tracking import Progress


def broken_pipe():
    end, start = os.pipe()
    os.close(end)
    return open(start, "w")


def unbuffered_broken_pipe():  # PYTHONUNBUFFERED
    end, start = os.pipe()
    os.close(end)
    return io.TextIOWrapper(io.FileIO(start, "w"), write_through=True)


def closed():
    stream = open(os.devnull, "w")
    stream.close()
    return stream


OUTPUTS = {
    "none": lambda: None,  # what Python makes of 2>&-
    "a pipe that nobody reads": broken_pipe,
    "such a pipe without a buffer": unbuffered_broken_pipe,
    "closed": closed,
    "a full disk": lambda: open("/dev/full", "w"),
}


@pytest.fixture(params=OUTPUTS)
def outputs(request, monkeypatch):
    streams = [OUTPUTS[request.param]() for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    yield request.param
    for stream in streams:
        with contextlib.suppress(AttributeError, OSError):
            stream.close()


def test_a_line_of_progress_never_ends_a_run(outputs):
    with Progress(10, "sampling", "images", every=0.0) as progress:
        progress.advance(3)
        progress.say("step 1")
    messages.say("8×8", messages.STDOUT)
    messages.say("8×8")


@pytest.mark.parametrize("outputs", ["none", "a pipe that nobody reads"], indirect=True)
def test_sampling_ends_with_its_file_and_without_parts(outputs, tiny, tmp_path):
    out = tmp_path / "x.npz"
    main(["sample", f"--checkpoint={tiny}", "--seeds=0-3", "--steps=4", f"--out={out}"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_what_ascii_cannot_show_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    messages.say("8×8 of \udcff", messages.STDOUT)
    assert stream.buffer.getvalue() == b"8\\xd78 of \\udcff\n"


@pytest.mark.parametrize(
    ("make", "status", "said"),
    [
        (broken_pipe, 141, ""),
        (unbuffered_broken_pipe, 141, ""),
        (OUTPUTS["a full disk"], 1, "jdm data list: .* No space left"),
    ],
)
def test_a_result_that_is_lost_is_no_success(make, status, said, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ending:
        patch.setattr(sys, "stdout", make())
        main(["data", "list"])
    assert ending.value.code == status
    err = capsys.readouterr().err
    assert ("Traceback" not in err and said[:14] in err) if said else err == ""


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    code = """
import os, sys
from jdm.messages import open_missing
open_missing()
print(os.open(sys.argv[1], os.O_CREAT) > 2, "\\xd7", file=sys.stdout)
print("lost", file=sys.stderr)
"""
    shell = f'"{sys.executable}" -c "$0" "$1" <&- 2>&-'
    argv = ["sh", "-c", shell, code, str(tmp_path / "file")]
    root = str(Path(messages.__file__).parent.parent)
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": root}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.stdout == "True \\xd7\n" and done.returncode == 0
