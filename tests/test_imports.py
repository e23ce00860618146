"""The import rules, and what may not be imported early."""

import configparser
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
        "import sys, jdm, jdm.cli, jdm.config; jdm.config.load('digits'); "
        "assert 'jax' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_package_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("jdm/**/__init__.py")}
    listed = set(setup["options"]["packages"].split())
    assert {".".join(folder.parts) for folder in folders} == {
        name for name in listed if not name.startswith("jdm.configs")
    }


def test_face():
    import jdm

    for name in jdm.__all__:
        assert getattr(jdm, name).__name__ == name
    assert not hasattr(jdm, "no_such_name")
