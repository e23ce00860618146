"""A newcomer's path: what README.md says, from a clone to a counterfactual of one's own pictures.

    python benchmarks/newcomer.py [--pictures=FOLDER] [--keep=FOLDER] [--seconds=newcomer.json]

Runs the commands of the README's first three blocks, line by line and as they stand, in a new
folder with an empty home: no environment, no cache, no data. Two things differ: the clone is of
this checkout (what is committed), and `make test` is left out. Needs git, make, Python and the
package index, and nothing of jdm. The README says to activate the environment, which is done here.

The pictures are those of --pictures, a folder of two classes, or else 100 threes and 100 eights of
the digits that come with scikit-learn, as colour PNGs of 96×96 pixels. Prints the seconds of every
command, of the way to the first sample, and of the way from the pictures to the counterfactual.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("make test",)
PICTURES = """
import numpy as np
from PIL import Image
from pathlib import Path
from sklearn.datasets import load_digits

digits = load_digits()
for digit, name in ((3, "three"), (8, "eight")):
    folder = Path("pictures") / name
    folder.mkdir(parents=True)
    for number, row in enumerate(np.flatnonzero(digits.target == digit)[:100]):
        grey = np.round(digits.images[row] * 255 / 16).astype(np.uint8)
        picture = Image.fromarray(grey).resize((96, 96), Image.Resampling.BICUBIC)
        picture.convert("RGB").save(folder / f"{number:03}.png")
"""


def blocks() -> list[list[str]]:
    """The commands of the README's blocks, a list for each block."""
    found = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    bare = [re.sub(r"\s+#.*", "", block.replace("\\\n", " "), flags=re.M) for block in found]
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in bare]


class Way:
    """The folder, the environment, and the seconds of the commands that ran there."""

    def __init__(self, folder: Path):
        self.folder, self.seconds = folder, {}
        home = folder / "home"
        home.mkdir()
        kept = ("PATH", "LANG", "SSL_CERT_FILE", "PIP_INDEX_URL", "PIP_CONFIG_FILE")
        self.environ = {name: os.environ[name] for name in kept if name in os.environ}
        self.environ |= {"HOME": str(home)}

    def run(self, command: str) -> None:
        """Runs a line of the README; ends the script where it fails."""
        if command in LEFT_OUT:
            return
        if command.startswith("cd "):
            self.folder /= command.removeprefix("cd ")
            path = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{self.environ['PATH']}"
            self.environ |= {"PATH": path}
            return
        line = re.sub(r"^git clone \S+", f"git clone --quiet {ROOT} jdm", command)
        print(f"\n$ {command}", flush=True)
        started = time.monotonic()
        done = subprocess.run(["bash", "-c", line], cwd=self.folder, env=self.environ)
        if done.returncode:
            sys.exit(f"newcomer: status {done.returncode} of: {command}")
        self.seconds[command] = round(time.monotonic() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="a folder of two classes (made of digits)")
    parser.add_argument("--keep", type=Path, help="a new folder that is kept (a temporary one)")
    parser.add_argument("--seconds", type=Path, help="a JSON file for the seconds (none)")
    arguments = parser.parse_args()
    first, packaged, own = blocks()[:3]
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.keep:
            arguments.keep.mkdir(parents=True)
        way = Way((arguments.keep or Path(temporary)).resolve())
        for command in (*first, *packaged):
            way.run(command)
        to_sample = sum(way.seconds.values())
        if arguments.pictures:
            shutil.copytree(arguments.pictures, way.folder / "pictures")
        else:
            python = way.folder / ".venv" / "bin" / "python"
            subprocess.run([python, "-c", PICTURES], cwd=way.folder, check=True)
        for command in own:
            way.run(command)
        to_counterfactual = sum(way.seconds.values()) - to_sample
        for name in ("samples.png", "pictures.png", "why.png"):
            if not (way.folder / name).stat().st_size:
                sys.exit(f"newcomer: {name} is empty")
    print()
    for command, seconds in way.seconds.items():
        print(f"{seconds:8.1f} s  {command}")
    print(f"{to_sample:8.1f} s  from the clone to samples (asked: under 600)")
    print(f"{to_counterfactual:8.1f} s  from the pictures to a counterfactual (asked: under 1800)")
    if arguments.seconds:
        totals = {"to_sample": to_sample, "to_counterfactual": to_counterfactual}
        text = json.dumps({"commands": way.seconds, **totals}, indent=2)
        arguments.seconds.write_text(text + "\n")


if __name__ == "__main__":
    main()
