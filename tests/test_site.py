"""The site: built without a warning, and complete without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the extra docs is not installed")
pytest.importorskip("myst_parser", reason="the extra docs is not installed")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_a_page_loads_nothing_from_elsewhere(site):
    pages = list(site.glob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"([^\"]+)", text)
        links = re.findall(r"<link[^>]*>", text)
        styles = [one for one in links if re.search(r'rel="(?:stylesheet|preload|icon)', one)]
        loaded += re.findall(r'href="([^"]+)', " ".join(styles))
        assert not [one for one in loaded if re.match(r"(?:\w+:)?//", one)], page.name
    for style in site.glob("_static/**/*.css"):
        assert not re.findall(r"(?:@import|url\()[^;)]*//[^;)]*", style.read_text()), style


@pytest.mark.slow
def test_formulas_are_mathml_with_their_numbers(site):
    text = (site / "method.html").read_text()
    assert text.count("<math") > 80 and "\\bar" not in text and "$$" not in text
    assert '<span class="eqno">(14a)</span>' in text


@pytest.mark.slow
def test_the_reference_and_the_keys_are_there(site):
    text = (site / "api.html").read_text()
    assert 'id="jdm-sample"' in text or 'id="jdmsample"' in text
    assert "steers samples toward their labels" in text
    assert "loss.classify" in (site / "config.html").read_text()
    links = re.findall(r'href="([^"]*jdm/names.py)"', (site / "extending.html").read_text())
    assert links and all(link.startswith("https://") for link in links)
