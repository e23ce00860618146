"""The documentation against the code: tables, commands, Python, links, docstrings, addresses."""

import ast
import configparser
import importlib.util
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import jdm
from jdm import cli
from jdm.config import load_config
from jdm.diffusion.method import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob(".github/**/*.md")]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")


def script(name: str):
    """A module of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables, api = script("tables"), script("api")


@pytest.mark.parametrize("page", tables.TABLES)
def test_tables_are_up_to_date(page):
    """Where not: python docs/tables.py."""
    assert (ROOT / "docs" / page).read_text() == tables.written(page)


def test_the_docstring_of_sample_lists_every_option():
    for name, option in OPTIONS.items():
        assert f"{name}: {option.help}" in jdm.sample.__doc__


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language; "" are commands."""
    fenced = rf"^```{language}\n(.*?)^```"
    return re.findall(fenced, page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The commands in the code blocks of README.md and docs/*.md, in words."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"; (?:do|done)|&&", line):
                    if part.strip().startswith(("jdm ", "python ", "make ", "pip ")):
                        found.append(shlex.split(part, comments=True))
    return found


def test_every_command_of_the_docs_is_whole():
    """It parses, its config loads and its benchmark has the flags; nothing is left out as "…"."""
    found, parser = commands(), cli.parser()
    assert len(found) > 20
    for words in found:
        assert "…" not in " ".join(words), words
        if words[0] == "jdm":
            overrides = [word for word in words if word.startswith("--config.")]
            given = parser.parse_args([word for word in words[1:] if word not in overrides])
            config = getattr(given, "config", None)
            if config and not config.endswith(".py"):
                load_config(config, overrides)
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:]), words
        elif words[0] == "pip":
            assert words[1] == "install", words
        else:
            source = (ROOT / words[1]).read_text()
            if "add_flags(parser" in source:  # flags that two scripts share
                source += (ROOT / "benchmarks" / "twins.py").read_text()
            for flag in (word.partition("=")[0] for word in words[2:] if word[0] == "-"):
                assert f'"{flag}"' in source, words


def test_every_extra_that_is_named_exists():
    named = {
        (path, extra)
        for path in [*PAGES, *ROOT.glob("jdm/**/*.py")]
        for extras in re.findall(r"(?<!\w)(?:jdm|\.)\[(\w+(?:,\w+)*)\]", path.read_text())
        for extra in extras.split(",")
        if "pip install" in path.read_text()
    }
    assert len(named) > 5
    known = set(SETTINGS["options.extras_require"])
    assert not {(path.name, extra) for path, extra in named if extra not in known}


# Python.

# extending.md adds files to the package: tests/test_extending.py runs it.
PYTHON = [(p.name, code) for p in PAGES if p.name != "extending.md" for code in blocks(p, "python")]


def called(tree: ast.AST) -> list[tuple[str, ast.Call | None]]:
    """("jdm.sample", its call) of all that code names in the package."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        (ast.unparse(node), calls.get(id(node)))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "jdm"
    ]


@pytest.mark.parametrize("page, code", PYTHON)
def test_python_names_what_there_is(page, code):
    """It compiles, its names of the package exist, and its calls fit their signatures."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jdm"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(
                    f"{node.module}.{name.name}"
                ), (page, name.name)
    for name, call in called(tree):
        found = getattr(jdm, name.removeprefix("jdm."))
        if call and not any(isinstance(one, ast.Starred) for one in call.args):
            given = {one.arg: None for one in call.keywords if one.arg}
            inspect.signature(found).bind(*call.args, **given)


def test_python_runs(tmp_path, monkeypatch):
    """README.md, the quickstart and the page on own images, one after the other; with few steps."""
    monkeypatch.chdir(tmp_path)
    sample, explain = jdm.sample, jdm.explain
    monkeypatch.setattr(jdm, "sample", lambda *a, **k: sample(*a, **k, steps=2), raising=False)
    quick = dict(steps=2, strengths=(0.5,), draws=1, again=0)
    monkeypatch.setattr(jdm, "explain", lambda *a, **k: explain(*a, **k, **quick), raising=False)
    pages = ("README.md", "quickstart.md", "own-images.md")
    codes = [code for page, code in PYTHON if page in pages]
    assert len(codes) == len(pages)
    for code in codes:
        exec(compile(code, "<docs>", "exec"), {})
    assert (tmp_path / "samples.png").stat().st_size > 0


# Links.


def slug(heading: str) -> str:
    """The anchor that a code host gives a heading."""
    text = re.sub(r"`([^`]*)`|\[([^]]*)\]\([^)]*\)", r"\1\2", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings."""
    return [slug(heading) for heading in re.findall(r"^#+ (.*)", prose(page), re.M)]


def dead_links(page: Path) -> list[str]:
    """The relative links of a page to files or headings that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page):
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c?\n[1](#a-b-c) [2](#d) [3](page.md#a-b-c) [4](no.md) [5](https://x.y)\n"
    )
    assert dead_links(page) == ["#d", "no.md"]


def test_every_page_is_in_the_navigation_of_the_site():
    source = (ROOT / "docs" / "conf.py").read_text()
    listed = ast.literal_eval(re.search(r"^NAVIGATION = (\{.*?^\})", source, re.S | re.M)[1])
    names = " ".join(listed.values()).split()
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(names) and len(names) == len(set(names))


# Docstrings, the address, and the length of the README.


def test_every_public_name_has_a_docstring(monkeypatch):
    assert api.undocumented() == [] and len(list(api.public())) > 20

    def bare(joint):
        pass

    monkeypatch.setattr(jdm, "features", bare, raising=False)
    with pytest.raises(api.MissingDocstringError, match="jdm.features"):
        api.reference()


def test_the_reference_has_every_option_of_sample():
    reference = api.reference()
    assert "## jdm.sample\n" in reference and "### jdm.Joint.denoise\n" in reference
    assert "guidance=None" in reference and all(one.help in reference for one in OPTIONS.values())


def test_the_address_of_the_repository_is_that_of_setup_cfg():
    url = SETTINGS["metadata"]["url"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    endings = (".md", ".cff", ".yml", ".ipynb", ".py", ".toml")
    for name in filter(lambda n: n.endswith(endings), listed.stdout.splitlines()):
        for found in re.findall(r"https://[\w.]+/[\w-]+/jdm(?![\w-])", (ROOT / name).read_text()):
            assert found == url, name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
