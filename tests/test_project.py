"""The files around the code: workflows, templates, the citation, and what a wheel holds."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import jdm
from jdm.cli import doctor
from jdm.config import config_names

ROOT = Path(__file__).parent.parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
TEMPLATES = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
LARGEST = 5 * 2**20  # bytes of a wheel


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_there_is(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and True in workflow  # YAML's "on"
    assert all(("run" in step) != ("uses" in step) for step in steps(workflow))
    commands = "\n".join(step.get("run", "") for step in steps(workflow))
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", commands, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for file in re.findall(r"\b(?:benchmarks|tests)/[\w./]+", commands):
        assert (ROOT / file).exists(), file
    assert all(job["runs-on"] == "ubuntu-latest" for job in workflow["jobs"].values())


def test_the_suite_runs_with_every_python_and_the_lowest_and_highest_jax():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert matrix == {"python": ["3.11", "3.12", "3.13"], "jax": ["lowest", "highest"]}
    pinned = re.search(r'"jax==([\d.]+)"', (ROOT / ".github/workflows/ci.yml").read_text())[1]
    required = re.search(r"^jax>=([\d.]+),", SETTINGS["options"]["install_requires"], re.M)[1]
    assert pinned == required
    assert SETTINGS["options"]["python_requires"] == ">=3.11"


def test_only_the_job_that_publishes_may_sign_in():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    allowed = {name: job.get("permissions", {}) for name, job in workflow["jobs"].items()}
    assert allowed == {"build": {}, "publish": {"id-token": "write"}}
    assert workflow["jobs"]["publish"]["needs"] == "build"
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_an_issue_template_is_a_form(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert all({"name", "url", "about"} == set(link) for link in form["contact_links"])
        return
    assert {"name", "description", "body"} <= set(form)
    assert all(one["attributes"]["label"] for one in form["body"])


def test_a_report_of_a_fault_asks_for_jdm_doctor():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    asked = [one for one in form["body"] if "jdm doctor" in one["attributes"]["label"]]
    assert asked and asked[0]["validations"]["required"]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)
    assert (
        cited["version"] == jdm.__version__ and cited["license"] == SETTINGS["metadata"]["license"]
    )
    assert cited["repository-code"] == SETTINGS["metadata"]["url"]


def test_jdm_doctor_knows_every_extra():
    assert set(doctor.EXTRAS) == set(SETTINGS["options.extras_require"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of what it is made from, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("jdm", "tests"):
        skipped = shutil.ignore_patterns("__pycache__", "fixtures")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    command += ["--no-index", "--wheel-dir", folder / "dist", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.stat().st_size < LARGEST
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = opened.read(f"jdm-{jdm.__version__}.dist-info/METADATA").decode()
        scripts = opened.read(f"jdm-{jdm.__version__}.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"jdm", f"jdm-{jdm.__version__}.dist-info"}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "jdm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("jdm/")} == package
    assert "jdm/py.typed" in names and "jdm = jdm.cli:main" in scripts
    assert {f"jdm/configs/{name}.py" for name in config_names()} <= names
    assert f"Project-URL: Homepage, {SETTINGS['metadata']['url']}" in metadata or (
        f"Home-page: {SETTINGS['metadata']['url']}" in metadata
    )


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import jdm\n"
        "assert jdm.__file__.startswith(sys.argv[1]), jdm.__file__\n"
        "from jdm.config import config_names, load_config\n"
        "[load_config(name, []) for name in config_names()]\n"
        "print(jdm.classify('digits', jdm.sample('digits', 1, steps=1).images).shape)\n"
    )
    command = [sys.executable, "-P", "-c", code, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "(1, 10)", done.stderr
