"""What the user waits for before anything happens: imports, help, first samples, first step.

    python benchmarks/start.py [--rounds=3] [--checkouts=.,/path/of/another]

Protocol: each figure is of a new process, from its start to its end, or, for training, to the line
that reports the first step. "cold" has an empty cache of compiled programs, "warm" the one that the
cold run left. Rounds alternate between the checkouts; medians. A ratio is that of the same round,
the first checkout's time to the last's, median (least to greatest).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from timing import spread

ROOT = Path(__file__).parent.parent
JDM = ("-m", "jdm")
SAMPLE = (*JDM, "sample", "--checkpoint=digits", "--seeds=0-15")
TRAIN = (*JDM, "train", "--config.log.every=1")
# name: (arguments of python, whether compiled programs are kept for it, the line it is timed to)
COMMANDS = {
    "import jdm": (("-c", "import jdm"), False, ""),
    "jdm --help": ((*JDM, "--help"), False, ""),
    "jdm sample --checkpoint=digits": (SAMPLE, True, ""),
    "the first step of jdm train --config=tiny": ((*TRAIN, "--config=tiny"), True, "step 1 "),
    "the first step of jdm train --config=digits": ((*TRAIN, "--config=digits"), True, "step 1 "),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkouts", default=str(ROOT), help="paths, separated by commas")
    arguments = parser.parse_args()
    checkouts = [Path(path).resolve() for path in arguments.checkouts.split(",")]
    seconds: dict[tuple[str, Path], list[float]] = {}
    for _ in range(arguments.rounds):
        for name, (command, compiles, line) in COMMANDS.items():
            for checkout in checkouts:
                with tempfile.TemporaryDirectory() as folder:
                    for state in ("cold", "warm") if compiles else ("",):
                        took = timed(command, line, checkout, Path(folder))
                        key = f"{name}, {state}" if state else name
                        seconds.setdefault((key, checkout), []).append(took)
    print(f"| seconds | {' | '.join(map(str, checkouts))} | ratio |")
    print("|---|" + "---|" * (len(checkouts) + 1))
    for name in dict.fromkeys(name for name, _ in seconds):
        each = [seconds[name, checkout] for checkout in checkouts]
        ratios = [a / b for a, b in zip(each[0], each[-1], strict=True)]
        print(f"| {name} | {' | '.join(f'{median(s):.2f}' for s in each)} | {spread(ratios)} |")


def timed(command: tuple[str, ...], line: str, checkout: Path, folder: Path) -> float:
    """Seconds until a process prints a line that begins with `line`, or ends where that is ""."""
    flags = {"sample": [f"--out={folder}/samples.png"], "train": [f"--workdir={folder}/run"]}
    more = next((flags[word] for word in command if word in flags), [])
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
    }
    shutil.rmtree(folder / "run", ignore_errors=True)
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    ) as process:
        assert process.stdout
        for printed in process.stdout:
            if line and printed.startswith(line):
                took = time.monotonic() - started
                process.terminate()
                process.communicate()
                return took
    took = time.monotonic() - started
    if process.returncode or line:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode} in {checkout}")
    return took


if __name__ == "__main__":
    main()
