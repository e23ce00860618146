"""Pictures in a terminal: which protocol, what is written, and nothing where none can be shown."""

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from jdm import terminal
from jdm.cli import main

TRUE_COLOUR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


@pytest.fixture
def picture(tmp_path):
    """A PNG of random colours, 6 wide and 4 high, in squares of 8×8 pixels."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(small.repeat(8, 0).repeat(8, 1)).save(path)
    return path, small


@pytest.mark.parametrize(
    "environ, encoding, expected",
    [
        ({"TERM": "xterm-kitty"}, "utf-8", terminal.kitty),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "utf-8", terminal.kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "ascii", terminal.iterm),
        (TRUE_COLOUR, "UTF-8", terminal.half_blocks),
        (TRUE_COLOUR, "ascii", None),
        (TRUE_COLOUR | {"NO_COLOR": "1"}, "utf-8", None),
        (TRUE_COLOUR | {"TERM": "dumb"}, "utf-8", None),
        ({"TERM": "xterm-256color"}, "utf-8", None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "utf-8", None),
        (TRUE_COLOUR | {"TMUX": "1"}, "utf-8", terminal.half_blocks),
        ({}, "", None),
    ],
)
def test_the_protocol_is_what_the_terminal_says_it_knows(environ, encoding, expected):
    assert terminal.protocol_of(environ, encoding) is expected


def test_kitty_gets_the_whole_file_in_parts(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(np.random.default_rng(0).bytes(10_000))
    parts = re.findall("\x1b_G(.*?);(.*?)\x1b\\\\", terminal.kitty(path))
    assert [keys for keys, _ in parts] == ["a=T,f=100,m=1", "m=1", "m=1", "m=0"]
    assert all(len(data) <= 4096 for _, data in parts)
    assert base64.b64decode("".join(data for _, data in parts)) == path.read_bytes()


def test_iterm_gets_the_whole_file(picture):
    path, _ = picture
    head, data = terminal.iterm(path).rstrip("\x07\n").split(":")
    assert head == f"\x1b]1337;File=inline=1;size={path.stat().st_size}"
    assert base64.b64decode(data) == path.read_bytes()


def drawn(text: str) -> np.ndarray:
    """The pixels that half blocks show."""
    cell = re.compile("\x1b\\[38;2;(\\d+);(\\d+);(\\d+)m\x1b\\[48;2;(\\d+);(\\d+);(\\d+)m▀")
    lines = []
    for line in text.splitlines():
        assert line.endswith("\x1b[0m")
        cells = np.array([tuple(map(int, found)) for found in cell.findall(line)])
        lines += [cells[:, :3], cells[:, 3:]]
    return np.array(lines)


@pytest.mark.parametrize("size, shape", [((6, 40), (4, 6)), ((200, 4), (4, 6))])
def test_half_blocks_show_the_pixels_that_fit(picture, monkeypatch, size, shape):
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: size)
    found, small = drawn(terminal.half_blocks(picture[0])), picture[1]
    assert found.shape == (*shape, 3)
    np.testing.assert_array_equal(found, small)


def test_an_odd_height_ends_in_half_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: (80, 40))
    Image.fromarray(np.full((3, 2), 200, np.uint8)).save(tmp_path / "odd.png")
    found = drawn(terminal.half_blocks(tmp_path / "odd.png"))
    assert found.shape == (4, 2, 3) and (found[:3] == 200).all() and not found[3].any()


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_picture_is_shown_in_a_terminal_alone(picture, monkeypatch, is_terminal):
    written = io.BytesIO()
    stream = (Terminal if is_terminal else io.TextIOWrapper)(written, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    for name in ("NO_COLOR", "TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TRUE_COLOUR.items():
        monkeypatch.setenv(name, value)
    assert terminal.show(picture[0]) is is_terminal
    assert bool(written.getvalue()) is is_terminal


def test_jdm_sample_shows_a_grid_and_says_where_it_is(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(terminal, "show", shown.append)
    for name in ("one.png", "two.npz"):
        out = tmp_path / name
        main(["sample", "--checkpoint=digits", "--seeds=0", "--steps=2", f"--out={out}"])
        assert f"wrote 1 images to {out}" in capsys.readouterr().out
    assert shown == [tmp_path / "one.png"]
