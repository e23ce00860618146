"""Runs the notebooks, and writes them back with their outputs.

    python notebooks/run.py                  # both; the packages are those of this environment
    python notebooks/run.py colab --html=out # also as a page, for a picture of it

The address of the repository is read from setup.cfg and written where the notebooks name it: in the
line SOURCE of the install cell, and in the badge that opens a notebook in Colab.
"""

import argparse
import configparser
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOKS = ("colab", "train")
INSTALL = "install"  # the tag of the cell that installs jdm


def address() -> str:
    """The repository's address, from setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(HERE.parent / "setup.cfg")
    return settings["metadata"]["url"].rstrip("/")


def opened(name: str) -> str:
    """The address at which Colab opens a notebook of the repository."""
    repository = address().removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{repository}"
    return f"{colab}/blob/main/notebooks/{name}.ipynb"


def path_of(name: str) -> Path:
    return HERE / f"{name}.ipynb"


def set_values(book: Any, values: Mapping[str, Any]) -> None:
    """Sets NAME = value in the code of a notebook, in the one line that begins with NAME =."""
    for name, value in values.items():
        line = re.compile(rf"^{name} = .*$", re.MULTILINE)
        cells = [c for c in book.cells if c.cell_type == "code" and line.search(c.source)]
        if len(cells) != 1:
            raise ValueError(f"{len(cells)} cells of the notebook set {name}")
        (cell,) = cells
        text = f"{name} = {json.dumps(value)}"  # with double quotes, as the formatter wants
        cell.source, count = line.subn(lambda _, text=text: text, cell.source)
        if count != 1:
            raise ValueError(f"the notebook sets {name} {count} times")


def set_address(book: Any, name: str) -> None:
    """Writes the repository's address where the notebook names it."""
    set_values(book, {"SOURCE": f"jdm[hub] @ git+{address()}"})
    first, badge = book.cells[0], r"https://colab\.research\.google\.com/github/\S+?\.ipynb"
    first.source, count = re.subn(badge, opened(name), first.source)
    if count != 1:
        raise ValueError("the first cell has no badge")


def run(book: Any, cwd: Path, kernel: str = "python3", install: bool = True) -> None:
    """Runs all cells in a new kernel, from the folder cwd; install: also the install cell.

    Raises nbclient's CellExecutionError where a cell raises.
    """
    client = NotebookClient(
        book,
        timeout=1200,
        kernel_name=kernel,
        resources={"metadata": {"path": str(cwd)}},
        coalesce_streams=True,
    )
    with client.setup_kernel():
        for index, cell in enumerate(book.cells):
            if install or INSTALL not in cell.metadata.get("tags", ()):
                client.execute_cell(cell, index)


def clean(book: Any) -> None:
    """Removes what differs between two runs, times and the versions of the kernel; what went to
    stderr; and the text that stands for a picture where none can be shown."""
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["text/plain"] = output.data["text/plain"].partition("(")[0]
    book.metadata.language_info = {"name": "python"}
    book.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NOTEBOOKS, help="colab, train (both)")
    parser.add_argument("--cwd", type=Path, default=Path("runs/notebooks"), help="where they run")
    parser.add_argument("--html", type=Path, help="a folder for the notebooks as pages")
    arguments = parser.parse_args()
    arguments.cwd.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        book = nbformat.read(path_of(name), as_version=4)
        set_address(book, name)
        run(book, arguments.cwd, install=False)
        clean(book)
        nbformat.write(book, path_of(name))
        print(f"wrote {path_of(name)}, {path_of(name).stat().st_size / 1000:.0f} kB")
        if arguments.html:
            from nbconvert import HTMLExporter

            page, _ = HTMLExporter().from_notebook_node(book)
            arguments.html.mkdir(parents=True, exist_ok=True)
            (arguments.html / f"{name}.html").write_text(page)


if __name__ == "__main__":
    main()
