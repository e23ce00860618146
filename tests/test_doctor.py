"""jdm doctor: every section is shown, and what is missing or damaged is named."""

import importlib.metadata
import shutil
from email.message import Message
from pathlib import Path

import pytest

from jdm.cli import doctor, main
from jdm.data.datasets import DATASETS
from jdm.data.records import Records


def test_one_screen_shows_every_section(run):
    done = run("doctor")
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    names = [line.split()[0] for line in lines if line[:1].strip()]
    assert {"jdm", "python", "packages", "device", "cores", "memory", "cache", "data"} <= set(names)
    assert any(line.strip() == "works" for line in lines)
    assert "digits: prepared" in done.stdout


def installed(*lines: str) -> Message:
    message = Message()
    for line in lines:
        message.add_header(*line.split(": ", 1))
    return message


def test_what_an_extra_lacks_is_named(monkeypatch):
    declared = installed(
        "Provides-Extra: fid",
        "Provides-Extra: torch",
        "Provides-Extra: test",
        'Requires-Dist: nosuchpackage>=1; extra == "fid"',
        'Requires-Dist: numpy<1; extra == "torch"',
        'Requires-Dist: numpy>=1; extra == "test"',
        "Requires-Dist: anotherone>=1",
    )
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: declared)
    found = dict(doctor.extras())
    assert found["[fid]"].startswith("nosuchpackage is missing: pip install 'jdm[fid]' (for")
    number = importlib.metadata.version("numpy")
    assert found["[torch]"].startswith(f"numpy {number} is not <1: pip install 'jdm[torch]'")
    assert found["[test]"].startswith("complete")
    assert found["[prepare]"].startswith("unknown: jdm was installed from an older version")


def test_damaged_data_is_named(tmp_path):
    digits = Records(DATASETS["digits"], "train")
    copy = shutil.copytree(digits.path, tmp_path / digits.path.relative_to(digits.root))
    assert dict(doctor.prepared_data(str(tmp_path)))[""] == "digits: prepared"
    (file,) = Path(copy).glob("*-train.*")
    file.write_bytes(file.read_bytes()[:-1000])
    said = dict(doctor.prepared_data(str(tmp_path)))[""]
    assert said.startswith("digits: the prepared files of digits in") and "delete that" in said


def test_what_is_broken_does_not_hide_the_rest(monkeypatch, capsys, tmp_path):
    def broken():
        raise RuntimeError("no driver")
        yield

    monkeypatch.setattr(doctor, "devices", broken)
    for name in ("extras", "memory", "compilation_cache"):
        monkeypatch.setattr(doctor, name, lambda: iter([("part", "seen")]))
    main(["doctor", f"--data_dir={tmp_path}"])
    shown = capsys.readouterr()
    assert "RuntimeError: no driver" in shown.err
    assert shown.out.count("seen") == 3 and "data " in shown.out


@pytest.mark.parametrize("exists", [True, False])
def test_the_free_space_of_a_folder_that_does_not_exist_is_that_of_its_parent(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "a" / "b"
    assert doctor._free(folder).endswith(" GiB of the disk free")
