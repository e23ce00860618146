"""Pictures in a terminal, where it can show them: kitty's and iTerm2's protocols, and otherwise two
pixels in each character, "▀" in 24-bit colours.

Owns what is written to the terminal. Nothing is shown where standard output is no terminal, where
NO_COLOR is set, and where the terminal does not say that it has 24-bit colours. (Whether a terminal
understands Sixel can only be found out by asking it and waiting for an answer.)
"""

import base64
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from jdm.messages import STDOUT

PART = 4096  # of base64 characters, the most that kitty takes at once
HALF = "▀"


def show(path: Path) -> bool:
    """Shows a PNG file, where the terminal can; returns whether it did."""
    protocol = STDOUT.isatty() and protocol_of(os.environ, STDOUT.encoding or "")
    if not protocol:
        return False
    STDOUT.write(protocol(path))
    STDOUT.flush()
    return True


def protocol_of(environ: Mapping[str, str], encoding: str) -> Callable[[Path], str] | None:
    """How a terminal shows a picture, by the variables that terminals set; None: it does not."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if environ.get("NO_COLOR") or term == "dumb":
        return None
    # tmux and screen keep the variables of the terminal outside, and pass no pictures on.
    inside = environ.get("TMUX") or term.startswith(("screen", "tmux"))
    if not inside and (term in ("xterm-kitty", "xterm-ghostty") or environ.get("KITTY_WINDOW_ID")):
        return kitty
    if not inside and program in ("iTerm.app", "WezTerm"):
        return iterm
    colours = environ.get("COLORTERM") in ("truecolor", "24bit")
    return half_blocks if colours and encoding.lower().replace("-", "") == "utf8" else None


def kitty(path: Path) -> str:
    """The PNG in kitty's graphics protocol, in parts of which all but the last have m=1."""
    data = base64.b64encode(path.read_bytes()).decode()
    parts = [data[i : i + PART] for i in range(0, len(data), PART)]
    found = []
    for number, part in enumerate(parts, 1):
        first = "a=T,f=100," if number == 1 else ""
        found.append(f"\x1b_G{first}m={int(number < len(parts))};{part}\x1b\\")
    return "".join(found) + "\n"


def iterm(path: Path) -> str:
    """The PNG in iTerm2's protocol of inline images."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"\x1b]1337;File=inline=1;size={path.stat().st_size}:{data}\x07\n"


def half_blocks(path: Path) -> str:
    """The picture in lines of characters, reduced by a whole factor until it fits the terminal."""
    columns, lines = shutil.get_terminal_size()
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    most = 2 * max(lines - 2, 1)
    image = image.reduce(max(-(-image.width // columns), -(-image.height // most), 1))
    if image.height % 2:
        image = image.crop((0, 0, image.width, image.height + 1))  # the new line is black
    pixels, rows = np.asarray(image), []
    for top, bottom in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{u};{v};{w}m{HALF}"
            for (r, g, b), (u, v, w) in zip(top, bottom, strict=True)
        ]
        rows.append("".join(cells) + "\x1b[0m\n")
    return "".join(rows)
