"""What a notebook shows of a run: the curves and the bar, without a kernel where none is needed."""

import io
import json

import pytest
from PIL import Image

from jdm import notebook, tracking, trainer
from jdm.config import load_config
from jdm.tracking import Progress, read_metrics

ROWS = [
    {"step": 1, "images": 16, "seconds": 1.0, "train/loss": 2.0, "train/accuracy": 0.1},
    {"step": 2, "images": 32, "seconds": 2.0, "train/loss": 1.0, "eval/accuracy": 0.5},
    {"step": 3, "images": 48, "seconds": 3.0, "train/images_per_second": 9, "eval/brier": 0.2},
]


def test_a_metric_has_a_panel_with_training_and_evaluation():
    panels = notebook.Curves(ROWS).panels()
    assert panels == {
        "loss": {"train": [(1, 2.0), (2, 1.0)]},
        "accuracy": {"train": [(1, 0.1)], "eval": [(2, 0.5)]},
        "brier": {"eval": [(3, 0.2)]},
    }


def test_curves_are_a_picture_also_of_no_rows():
    for rows in (ROWS, ()):
        assert Image.open(io.BytesIO(notebook.Curves(rows)._repr_png_())).width > 100


class Display:
    """In place of IPython's display: what a cell shows, and how often it was replaced."""

    def __init__(self):
        self.shown, self.updates = [], 0

    def __call__(self, content, **_):
        self.shown.append(content)
        return self

    def update(self, content, **_):
        self.shown[-1] = content
        self.updates += 1


@pytest.fixture
def display(monkeypatch):
    ipython = pytest.importorskip("IPython.display", reason="comes with ipykernel, extra test")
    found = Display()
    monkeypatch.setattr(ipython, "display", found)
    monkeypatch.setattr(notebook, "is_running", lambda: True)
    return found


def test_a_run_that_is_resumed_replaces_its_later_rows():
    curves = notebook.Curves(ROWS)
    curves({**ROWS[1], "train/loss": 9.0})
    assert [row["step"] for row in curves.rows] == [1, 2] and curves.rows[-1]["train/loss"] == 9.0


def test_every_row_replaces_the_curves(display):
    curves = notebook.Curves()
    for row in ROWS:
        curves(row)
    assert len(display.shown) == 1 and display.updates == 2
    assert display.shown[0]["text/plain"] == "Curves of 3 rows, the last at step 3"


def test_a_bar_is_one_output_with_rate_and_time_left(display, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now[0])
    with Progress(100, "training <b>", "images") as progress:
        progress.advance(10)
        assert not display.shown  # what is quick shows no bar
        now[0] = 5.0
        progress.advance(40)
        assert display.shown[0]["text/plain"].endswith(
            "50 of 100 images, 10 images/s, 00:05, 00:05 left"
        )
        progress.advance(1)  # too soon after the last change
        assert display.updates == 0
    (shown,) = display.shown
    assert 'value="51" max="100"' in shown["text/html"]
    assert "training &lt;b&gt;: 51 of 100 images" in shown["text/html"]
    assert shown["text/plain"] == "training <b>: 51 of 100 images, 10.2 images/s, in 00:05"


def test_rows_go_to_the_callback_and_not_to_the_terminal(tmp_path, capfd):
    rows = []
    config = load_config("tiny", ["--config.train.steps=2", "--config.eval.every=0"])
    trainer.train(config, tmp_path, on_row=rows.append)
    assert rows == read_metrics(tmp_path) and [row["step"] for row in rows] == [1, 2]
    assert "step 1 " not in capfd.readouterr().err
    assert json.loads((tmp_path / tracking.METRICS).read_text().splitlines()[0]) == rows[0]
