"""The notebooks: run in new kernels with small data, and agree with the repository's address."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient, of the extra test")
pytest.importorskip("nbclient", reason="of the extra test")
pytest.importorskip("ipykernel", reason="of the extra test")

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("notebooks_run", ROOT / "notebooks" / "run.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)


BRIEF = "seeds=range(1), steps=2, draws=1"  # of a counterfactual


def read(name):
    return nbformat.read(notebooks.path_of(name), as_version=4)


def edit(book, old: str, new: str) -> None:
    """Replaces what stands once in the code."""
    (cell,) = [one for one in book.cells if one.cell_type == "code" and old in one.source]
    cell.source = cell.source.replace(old, new)


def pictures(book) -> list[int]:
    """The number of the cell of each picture among the outputs."""
    return [
        number
        for number, cell in enumerate(book.cells)
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]


def text(book) -> str:
    """What the cells printed."""
    outputs = [one for cell in book.cells for one in cell.get("outputs", ())]
    return "".join(one.get("text", "") for one in outputs)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """kernel(python) -> the name of a kernel of this interpreter."""

    def made(python) -> str:
        folder = tmp_path / "jupyter" / "kernels" / "jdm-test"
        folder.mkdir(parents=True)
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": argv, "display_name": "jdm-test", "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        return "jdm-test"

    return made


@pytest.fixture
def empty_environment(tmp_path):
    """The python of an environment that has every package of this one but jdm."""
    here = Path(next(path for path in sys.path if path.endswith("site-packages")))
    others = tmp_path / "others"
    others.mkdir()
    for path in here.iterdir():
        if not path.name.startswith(("jdm", "__editable__")):
            (others / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n")
    return tmp_path / "env" / "bin" / "python"


@pytest.fixture
def wheel(tmp_path):
    """A wheel of this checkout, built from a copy of what is needed."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jdm", source / "jdm", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", f"--wheel-dir={tmp_path}", source]
    subprocess.run(command, check=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    (found,) = tmp_path.glob("jdm-*.whl")
    return found


def test_colab_from_a_wheel_to_pictures(
    kernel, empty_environment, wheel, tiny, tmp_path, monkeypatch
):
    """All cells, the install cell too, away from the checkout. The model is tiny: that a wheel has
    the packaged one is in tests/test_project.py."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # everything but jdm is there
    monkeypatch.delenv("PYTHONPATH", raising=False)
    book, work = read("colab"), tmp_path / "work"
    work.mkdir()
    labels = [3, 5]
    notebooks.set_values(book, {"SOURCE": str(wheel), "LABELS": labels, "CHECKPOINT": str(tiny)})
    assert len(book.cells) < 10
    edit(book, 'jdm.load("digits")', f'jdm.load("{tiny}")')
    edit(book, "seeds=range(3)", BRIEF)
    notebooks.run(book, work, kernel(empty_environment))
    assert set(pictures(book)) == {2, 3, 4, 5, 6}
    assert f"{tiny}: step 4" in text(book)
    (site,) = empty_environment.parent.parent.glob("lib/python*/site-packages")
    assert (site / "jdm").is_dir()  # what ran is the wheel


def test_train_shows_curves_and_what_was_learned(tmp_path):
    book = read("train")
    notebooks.set_values(book, {"STEPS": 2, "COUNT": 10, "SIZE": 8, "LABELS": [0, 2]})
    edit(book, '"model.channels": 24', '"model.channels": 8, "model.multipliers": (1,)')
    edit(book, '"model.attention": (SIZE // 2,)', '"model.attention": ()')
    edit(book, "targets, training_images", f"targets, {BRIEF}, training_images")
    notebooks.run(book, tmp_path, install=False)
    assert set(pictures(book)) == {4, 5, 6, 7}
    assert pictures(book).count(5) == 1  # the curves are one output, which is replaced
    (curves,) = [one for one in book.cells[5].outputs if "image/png" in one.get("data", {})]
    assert curves.data["text/plain"] == "Curves of 2 rows, the last at step 2"
    assert "step 2 " not in text(book)  # the rows are not printed as well
    assert "27 images to train on, 3 held out" in text(book)
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_a_notebook_names_the_address_of_the_repository(name):
    """Where not: python notebooks/run.py."""
    book = read(name)
    before = [cell.source for cell in book.cells]
    notebooks.set_address(book, name)
    assert [cell.source for cell in book.cells] == before
    assert f"]({notebooks.opened(name)})" in (ROOT / "docs" / "notebooks.md").read_text()


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_the_committed_notebook_has_its_pictures(name):
    book = read(name)
    shown = {number for number, cell in enumerate(book.cells) if "jdm.sample" in cell.source}
    assert shown <= set(pictures(book)) and len(set(pictures(book))) >= 4
    assert not any(o.output_type == "error" for c in book.cells for o in c.get("outputs", ()))
    assert notebooks.path_of(name).stat().st_size < 300_000
    assert str(ROOT) not in notebooks.path_of(name).read_text()


def test_a_value_that_the_notebook_does_not_set():
    with pytest.raises(ValueError, match="0 cells of the notebook set NOTHING"):
        notebooks.set_values(read("colab"), {"NOTHING": 1})
