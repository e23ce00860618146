"""How Sphinx makes the pages: `make docs`, into build/site. Nothing is loaded from elsewhere,
neither when they are made nor when they are read.

The pages are plain Markdown, as a code host shows them. Added here: links that lead out of docs/ go
to the repository, formulas become MathML, and api.md gets the docstrings of the public names.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import api
import mathml
import repository

project = "jdm"
author = "the jdm authors"
copyright = "the jdm authors, Apache-2.0"
release = version = importlib.metadata.version("jdm")

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["*.py"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
highlight_language = "text"
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = f"jdm {release}"
html_show_sphinx = False
html_theme_options = {
    "source_repository": repository.URL,
    "source_branch": repository.BRANCH,
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp, .go"

# {caption: pages}. A page that another part of the project brings is listed where it exists.
NAVIGATION = {
    "Begin": "quickstart own-images notebooks serve hardware plan scaling launch faq",
    "Use": "sampling evaluation explain probe data augment convert hub config api",
    "Understand": "method results performance design extending",
}


def navigation() -> str:
    """The tables of contents of the site, which index.md does not show."""
    there = {path.stem for path in Path(__file__).parent.glob("*.md")}
    parts = []
    for caption, pages in NAVIGATION.items():
        listed = "\n".join(page for page in pages.split() if page in there)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```")
    return "\n\n".join(parts)


def complete(app, page: str, source: list[str]) -> None:
    """Adds to a page what the site has and its file does not."""
    outside = f"]({repository.URL}/blob/{repository.BRANCH}/"
    text = re.sub(r"\]\(\.\./(?!\.)", outside, source[0])
    added = {"index": navigation, "api": api.reference}
    source[0] = f"{text}\n\n{added[page]()}\n" if page in added else text


def setup(app) -> None:
    app.connect("source-read", complete)
    mathml.setup(app)
