"""Reports, their comparison, and their commands, with values that the tests choose."""

import base64
import dataclasses
import io
import json
import math
import re

import pytest
from PIL import Image

from jdm.analysis import comparison, page, report
from jdm.analysis.evaluators import EVALUATORS
from jdm.analysis.evaluators.base import Curve, Record, Table
from jdm.analysis.figures import picture
from jdm.config import OPTIONS
from jdm.errors import InvalidValue
from jdm.names import Names, metric_of

CURVE = Curve("t", "accuracy", [0, 10, 20], {"clean|noised": [1.0, 0.5, math.nan]})
CONFUSION = Table(["<cat>", "dog"], ["<cat>", "dog"], [[3, 1], [0, 4]])
CLASSES = Table(["<cat>", "dog"], ["F1", "images"], [[0.86, 4], [math.nan, 4]])
VALUES = {
    "accuracy": 0.875,
    "kid_8/joint": 0.000123456,
    "by_t": CURVE,
    "confusion": CONFUSION,
    "classes": CLASSES,
    "sampling": Record({"method": {"steps": 20, "scale": None}, "seeds": [0, 7]}),
}
PROTOCOL = {
    "checkpoint": "runs/<a>",
    "step": 4,
    "data": "digits",
    "contents": "0123",
    "split": "test",
    "images": 1360,
    "seed": 3,
    "method": {"steps": 20, "scale": None},
}


def report_of(protocol=(), **values):
    return report.Report(PROTOCOL | dict(protocol), {"classification": values})


@pytest.fixture(scope="module")
def whole():
    return report_of(**VALUES)


@pytest.fixture(scope="module")
def html(whole):
    return page.html(whole)


def test_a_report_survives_json(whole, tmp_path):
    (tmp_path / "report.json").write_text(report.to_json(whole))
    for path in (tmp_path, tmp_path / "report.json"):
        back = report.read("reports", path)
        assert back.protocol == whole.protocol
        assert {k: type(v) for k, v in back.results["classification"].items()} == {
            k: type(v) for k, v in VALUES.items()
        }
        assert repr(back.results) == repr(whole.results)  # NaN is not equal to itself


def test_the_page_loads_nothing_and_embeds_its_pictures(html):
    sources = re.findall(r"""(?:src|srcset|href|action|data)=["']?([^"' >]*)""", html)
    assert len(sources) == 4  # two pictures in two themes
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).width > 500
    rest = re.sub(r"base64,[A-Za-z0-9+/=]*", "", html)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", rest)
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html and "color-scheme: light dark" in html


def test_the_themes_of_a_picture_differ_in_their_background():
    light, dark = (Image.open(io.BytesIO(png)).convert("L") for png in picture(CURVE))
    assert light.getpixel((0, 0)) == 255 and dark.getpixel((0, 0)) < 50
    assert picture(CLASSES) is None and picture(VALUES["sampling"]) is None and picture(0.5) is None


def test_names_are_text_on_the_page(html):
    assert "<cat>" not in html and "&lt;cat&gt;" in html and "<title>runs/&lt;a&gt; at" in html


@pytest.mark.parametrize("kind", ["markdown", "html"])
def test_the_protocol_stands_beside_the_numbers(whole, html, kind):
    text = report.markdown(whole) if kind == "markdown" else html.replace("&lt;a&gt;", "<a>")
    said = "runs/<a> at step 4, digits test (1,360 images), seed 3"
    section = text[text.index("h2>classification" if kind == "html" else "## classification") :]
    assert section.index(said) < section.index("0.8750") < section.index("0.000123")
    assert "method.steps" in section and "method.scale" not in section


def test_tables_in_markdown(whole):
    text = report.markdown(whole)
    assert "| accuracy | 0.8750 | higher |\n" in text
    assert "| t | clean\\|noised (accuracy) |\n|---|---|\n| 0 | 1.0000 |\n" in text
    assert "|  | F1 | images |\n|---|---|---|\n| <cat> | 0.8600 | 4 |\n| dog | nan | 4 |" in text


def test_long_curves_and_large_tables_are_shortened():
    x = list(range(1000))
    rows = report.cells(Curve("t", "bits", x, {"bound": x}), 5)
    assert [row[0] for row in rows] == ["t", "0", "250", "500", "749", "999"]
    names = list("ab") * 50
    (only,) = report.cells(Table(names, names, [[0.0] * 100] * 100))
    assert only == ["", "100 rows, 100 columns: see report.json"]
    assert report.cells(Curve("t", "", [], {"a": []})) == [["t", "a"]]
    assert report.cells(Curve("t", "", [7], {"a": [0.5]}))[1:] == [["7", "0.5000"]]


def test_the_terminal_has_a_line_for_each_number(whole):
    shown = report.lines(whole.results["classification"])
    assert shown[:2] == ["accuracy       0.8750", "kid_8/joint    0.000123"]
    assert shown[2:5] == ["by_t:", "  t   clean|noised (accuracy)", "  0   1.0000"]


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("accuracy", "higher"),
        ("cross_entropy", "lower"),
        ("frechet_1000/reference", "lower"),
        ("prd_f1_8", "higher"),
        ("prd_f1_8_1000/joint", "higher"),
        ("agreement/svc", "higher"),
        ("agreement/svc_real", ""),
        ("frechet_real_1000/joint", ""),
        ("temperature", ""),
    ],
)
def test_which_end_of_a_metric_is_better(name, better):
    assert report.better(name) == better
    assert (metric_of(name) is None) == (better == "")


def test_a_comparison_marks_the_best_where_the_direction_is_known():
    a = report_of(accuracy=0.8, cross_entropy=0.5, temperature=1.0, brier=0.1, by_t=CURVE)
    b = report_of(accuracy=0.9, cross_entropy=0.7, temperature=2.0, brier=math.nan)
    c = report_of(accuracy=0.9, recall=0.5)
    rows = comparison.compared({"a": a, "b": b, "c": c})
    assert rows[0] == ["evaluator", "metric", "better", "a", "b", "c"]
    assert {row[1]: row[3:] for row in rows[1:]} == {
        "accuracy": ["0.8000", "**0.9000**", "**0.9000**"],
        "cross_entropy": ["**0.5000**", "0.7000", ""],
        "temperature": ["1.0000", "2.0000", ""],
        "brier": ["0.1000", "", ""],  # of one value there is no best
        "recall": ["", "", "0.5000"],
    }


def test_a_comparison_names_the_differences_of_the_protocols():
    a, same = report_of(), report_of({"checkpoint": "runs/b", "step": 8})
    assert comparison.differences({"a": a, "b": same}) == []
    changes = {"split": "train", "contents": "4567", "method": {"steps": 50, "scale": None}}
    assert comparison.differences({"a": a, "b": report_of(changes)}) == [
        'The reports differ in contents: "0123" in a, "4567" in b.',
        'The reports differ in split: "test" in a, "train" in b.',
        "The reports differ in method.steps: 20 in a, 50 in b.",
    ]


@pytest.fixture
def folders(tmp_path):
    """The folders of two reports, relative to the working folder, and of what is none."""
    accuracies = {"a": 0.25, "b": 0.75}
    for name, accuracy in accuracies.items():
        changes = {"split": "test" if name == "a" else "validation"}
        (tmp_path / name).mkdir()
        content = report.to_json(report_of(changes, accuracy=accuracy, by_t=CURVE))
        (tmp_path / name / "report.json").write_text(content)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text(json.dumps({"accuracy": 0.5, "split": "test"}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize("ending", [".png", ".html"])
def test_jdm_compare_prints_a_table_and_draws_a_figure(run, folders, ending):
    done = run("compare", "a", "b", f"--out=compare{ending}", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert 'The reports differ in split: "test" in a, "validation" in b.\n' in done.stdout
    assert "\n| classification | accuracy | higher | 0.2500 | **0.7500** |\n" in done.stdout
    out = folders / f"compare{ending}"
    if ending == ".png":
        assert Image.open(out).height > 300
    else:
        text = out.read_text()
        assert "<b>0.7500</b>" in text and "**" not in text and "data:image/png;base64," in text
        assert "differ in split: &quot;test&quot; in a" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a"], "reports must be two or more different ones"),
        (["a", "a"], "reports must be two or more different ones"),
        (["a", "absent"], "reports='absent' is not a report: absent: No such file or directory"),
        (["a", "old"], "reports='old' cannot be read: old/report.json is not a report of jdm eval"),
        (["a", "broken"], "reports='broken' cannot be read: broken/report.json is damaged: "),
        (["a", "b", "--out=x.pdf"], "--out='x.pdf' must end in .png or .html"),
        (["a", "b", "--out=no/x.png"], "--out='no/x.png' cannot be written: the folder no does"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(run, folders, given, said):
    done = run("compare", *given, cwd=folders)
    assert done.returncode == 2 and done.stderr.startswith(f"jdm compare: {said}"), done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


# jdm eval -----------------------------------------------------------------------------------------


@pytest.fixture
def evaluators(monkeypatch):
    """Two evaluators that need no network; the second fails. The options that they were given."""
    given = []

    def first(joint, split, options):
        given.append(options)
        yield from VALUES.items()

    def second(joint, split, options):
        raise InvalidValue("split", split.name, "is not what this evaluator needs")
        yield

    option = dataclasses.replace(OPTIONS["eval.metrics"], names=Names(["classification", "second"]))
    monkeypatch.setitem(OPTIONS, "eval.metrics", option)
    monkeypatch.setitem(EVALUATORS, "classification", first)
    monkeypatch.setitem(EVALUATORS, "second", second)
    return given


def test_jdm_eval_writes_three_files_and_replaces_them(run, tiny, evaluators, tmp_path):
    flags = ("--ood=digits", "--samples=5", "--seed=9", "--features=joint", "--steps=7")
    given = (f"--checkpoint={tiny}", "--metrics=classification", f"--out={tmp_path}")
    (tmp_path / "notes.txt").write_text("mine")
    for more in ((), flags):
        done = run("eval", *given, *more)
        assert done.returncode == 0, done.stderr
    assert "images         360\naccuracy       0.8750\n" in done.stdout
    assert "classification took 0 s\n" in done.stderr
    names = {"notes.txt", "report.html", "report.json", "report.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = report.read("report", tmp_path)
    assert repr(found.results["classification"]) == repr(VALUES)
    protocol = found.protocol
    assert (protocol["step"], protocol["split"], protocol["images"]) == (4, "test", 360)
    assert (protocol["seed"], protocol["samples"], protocol["features"]) == (9, 5, "joint")
    assert protocol["method"]["steps"] == 7 and protocol["size"] == "8×8×1"
    assert {"weights", "contents", "jdm", "jax", "date", "device"} <= set(protocol)
    assert found.title in (tmp_path / "report.md").read_text()
    default, options = evaluators
    assert (default.samples, default.features, default.other) == (1000, "reference", None)
    assert (options.samples, options.seed, options.method.steps) == (5, 9, 7)
    assert len(options.other.images) == 360 and options.load("validation").name == "validation"


def test_a_failure_says_which_figures_are_complete(run, tiny, evaluators, tmp_path):
    metrics = "--metrics=classification,second"
    done = run("eval", f"--checkpoint={tiny}", metrics, f"--out={tmp_path / 'report'}")
    assert done.returncode == 2 and "accuracy       0.8750\n" in done.stdout
    assert done.stderr.splitlines()[-2:] == [
        "no report was written; what is printed of classification is complete",
        "jdm eval: --split='test' is not what this evaluator needs",
    ]
    assert list((tmp_path / "report").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--metrics=clasification"], "--metrics='clasification' is unknown; known: "),
        (["--samples=0"], "--samples=0 must be positive"),
        (["--features=pixels"], "--features='pixels' is unknown; known: reference, joint, "),
        (["--ood=minst"], "--ood='minst' is unknown; known: "),
        (["--seed=-1"], "--seed=-1 must be between 0 and "),
        (["--guidance=pixels"], "--guidance='pixels' is unknown; known: "),
    ],
)
def test_a_wrong_flag_is_one_sentence_before_the_model_is_loaded(run, flags, said):
    done = run("eval", "--checkpoint=absent", *flags)
    assert done.returncode == 2 and done.stderr.startswith(f"jdm eval: {said}"), done.stderr


def test_an_output_that_is_a_file_is_one_sentence(run, tiny, tmp_path):
    (tmp_path / "out").touch()
    done = run("eval", f"--checkpoint={tiny}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "/out' cannot be written: File exists\n" in done.stderr
