"""jdm.files: nothing half-written has a final name, and nothing that a person made is deleted."""

import os

import pytest

from jdm.errors import Failure, InvalidValue
from jdm.files import MARK, UNFINISHED, is_system, read_json, whole_folder, write_whole


def test_a_folder_of_a_person_is_not_in_the_way_of_ours(tmp_path):
    for name in ("out.partial", f"out.{UNFINISHED}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("all of it")
    with pytest.raises(InvalidValue) as info, whole_folder(tmp_path / "out"):
        pass
    said = "is in the way, and jdm has not made it; move it away"
    assert str(info.value) == f"{tmp_path / f'out.{UNFINISHED}'} {said}"
    (tmp_path / f"out.{UNFINISHED}").rename(tmp_path / "moved")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path / "out") == ["a"]
    for name in ("out.partial", "moved"):
        assert (tmp_path / name / "thesis.txt").read_text() == "all of it"


def test_what_a_killed_process_left_of_a_folder_is_replaced(tmp_path):
    left = tmp_path / f"out.{UNFINISHED}"
    left.mkdir()
    (left / MARK).touch()
    (left / "half").touch()
    with pytest.raises(KeyError), whole_folder(tmp_path / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_file_of_a_person_is_not_what_is_written_to(tmp_path):
    (tmp_path / "x.png.partial").write_text("mine")
    write_whole(tmp_path / "x.png", "ours")
    assert (tmp_path / "x.png.partial").read_text() == "mine"
    assert (tmp_path / "x.png").read_text() == "ours"
    assert sorted(os.listdir(tmp_path)) == ["x.png", "x.png.partial"]


@pytest.mark.parametrize("content", [b'{"a": [1]}', b'\xef\xbb\xbf{"a": [1]}', b'{"a":\r\n[1]}'])
def test_json_with_the_marks_of_an_editor_is_read(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert read_json(tmp_path / "x") == {"a": [1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": ', "Expecting value"),
        (b"[1]", "it holds no JSON object"),
        (b"null", "it holds no JSON object"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b'{"\xff": 1}', "can't decode byte 0xff"),
        (b"\x00" * 9, "can't decode"),
        (b"[" * 100_000, "maximum recursion depth"),
    ],
)
def test_damaged_json_is_one_sentence_that_names_the_file(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Failure) as info:
        read_json(tmp_path / "x")
    assert str(info.value).startswith(f"{tmp_path / 'x'} is damaged: ") and said in str(info.value)
    assert "\n" not in str(info.value)


def test_what_the_system_adds_is_told_from_what_a_person_adds():
    system = (".DS_Store", "._weights", "Thumbs.db", "desktop.ini", "Desktop.ini", ".nfs00a1")
    person = ("notes.txt", ".hidden", "desktop.ini.txt", "0", "DS_Store")
    assert all(map(is_system, system)) and not any(map(is_system, person))
