import json
import time

import pytest

from jdm.tracking import MetricLog, Progress, read_metrics, shown


def test_rows_go_to_jsonl_and_tensorboard(tmp_path):
    with MetricLog(tmp_path, 0, time.monotonic()) as log:
        log.write(2, 64, {"train/loss": 0.5})
        log.write(4, 128, {"train/loss": 0.25, "eval/accuracy": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(row)[:3] for row in rows] == [["step", "images", "seconds"]] * 2
    assert rows == read_metrics(tmp_path)
    assert rows[1]["eval/accuracy"] == 1.0 and rows[1]["images"] == 128
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_resuming_moves_the_rows_of_later_steps(tmp_path, capsys):
    with MetricLog(tmp_path, 0, time.monotonic() - 100) as log:
        for step in (1, 2, 3):
            log.write(step, step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ima')  # killed while writing a line
    with MetricLog(tmp_path, 2, time.monotonic()) as log:
        log.write(3, 3, {"train/loss": 30.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["train/loss"] == 30.0
    assert rows[-1]["seconds"] >= rows[1]["seconds"] >= 100  # of both runs
    replaced = tmp_path / "metrics.replaced.jsonl"  # nothing is lost
    said = f"moved 2 rows after step 2, or damaged, from {tmp_path / 'metrics.jsonl'} to {replaced}"
    assert said in capsys.readouterr().out
    first, second = replaced.read_text().splitlines()
    assert json.loads(first)["step"] == 3 and second == '{"step": 4, "ima'
    with MetricLog(tmp_path, 3, time.monotonic()):
        pass
    assert read_metrics(tmp_path) == rows and capsys.readouterr().out == ""


def test_damaged_lines_are_skipped_with_a_warning_that_numbers_them(tmp_path):
    good = [b'{"step": %d, "images": 1, "seconds": 0.5}' % step for step in (1, 2, 3)]
    bad = [b"", b"{}", b"[1]", b'{"step": "x", "seconds": 1}', b"\xff\xfe", b'{"step": 2, "ima']
    lines = [b"\xef\xbb\xbf" + good[0], *bad[:3], good[1] + b"\r", *bad[3:], good[2]]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"metrics.jsonl: skipped lines 2, 3, 4, 6, 7, 8, damaged"):
        rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    with MetricLog(tmp_path, 3, time.monotonic()):
        pass
    assert read_metrics(tmp_path) == rows
    assert (tmp_path / "metrics.replaced.jsonl").read_bytes() == b"\n".join(bad) + b"\n"


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    with Progress(10, "sampling", "images", done=4, every=0.0) as progress:
        progress.advance(3)
    err = capsys.readouterr().err
    assert "sampling: 7/10 images" in err and "s left" in err and "\r" not in err


def test_an_evaluation_is_a_table_below_the_line_of_the_training():
    row = {"train/loss": 0.5, "eval/accuracy": 0.975, "eval/cross_entropy": 0.0712}
    line, *rows = shown(400, row, {}).splitlines()
    assert line == "step 400  train/loss 0.5"
    assert [one.split() for one in rows] == [
        ["now"],
        ["accuracy", "0.975"],
        ["cross_entropy", "0.0712"],
    ]
    assert len(set(map(len, rows))) == 1  # numbers end in one column
    _, *rows = shown(400, row, {"train/loss": 1.0, "eval/accuracy": 0.5}).splitlines()
    assert rows[0].split() == ["now", "before"] and rows[1].split() == ["accuracy", "0.975", "0.5"]
    assert rows[2].split() == ["cross_entropy", "0.0712"]  # which was not measured before
    assert shown(1, {"train/loss": 0.5}, row) == "step 1  train/loss 0.5"
