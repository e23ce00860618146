"""The import rules, and what may not be imported early."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_imports_point_down():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_import_jdm_and_configs_without_jax():
    code = (
        "import sys, jdm, jdm.cli, jdm.config; jdm.config.load_config('digits'); "
        "assert 'jax' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_training_starts_without_what_evaluations_need():
    code = "import sys, jdm.trainer; assert not {'sklearn', 'pandas', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_help_is_printed_without_numpy():
    code = (
        "import sys; from jdm.cli import parser; parser().format_help(); "
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_folder_of_modules_is_a_package():
    """setup.cfg finds packages by their __init__.py; a folder without one is not installed."""
    folders = {path.parent for path in ROOT.glob("jdm/**/*.py")}
    assert folders == {path.parent for path in ROOT.glob("jdm/**/__init__.py")}


def test_face():
    import jdm

    for name in jdm.__all__:
        assert getattr(jdm, name).__name__ == name
    assert not hasattr(jdm, "no_such_name")
