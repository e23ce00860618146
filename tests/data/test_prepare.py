"""What the preparation of a data set refuses, and which files it leaves."""

import contextlib
import errno
import hashlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.utils import Size

from jdm.data import DataError
from jdm.data import prepare as module
from jdm.data.prepare import prepare
from jdm.data.splits import ReadOptions, load_split
from jdm.errors import InvalidValue


def test_missing_tensorflow_names_the_extra_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as info:
        prepare("cifar10", str(tmp_path))
    assert str(info.value) == (
        "preparing cifar10 needs TensorFlow (reading it does not): pip install "
        "'jdm[prepare]'; the download is 162 MiB"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """A builder of cifar10, as if TensorFlow were installed. fails: raised by its download."""
    fake = SimpleNamespace(data_path=tmp_path / "data" / "cifar10" / "3.0.2", fails=None, read=[])

    def download_and_prepare(**options):
        fake.options = options
        if fake.fails:
            raise fake.fails
        fake.data_path.mkdir(parents=True)

    fake.download_and_prepare = download_and_prepare
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "make_builder", lambda facts, data_dir: fake)
    monkeypatch.setattr(module, "whole_split", lambda *args: fake.read.append(args[1]))
    return fake


class DownloadError(Exception):
    """As a downloader raises it without a network."""


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (DownloadError("Failed to resolve 'host'\nand more"), "could not be downloaded and prep"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left in "),
        (RuntimeError("write() failed: No space left on device"), "no space is left in "),
        (ConnectionResetError(), "cifar10 could not be downloaded and prepared: ConnectionReset"),
    ],
)
def test_no_network_and_no_space_are_one_sentence(builder, fails, said):
    builder.fails = fails
    with pytest.raises(DataError, match=said) as info:
        prepare("cifar10")
    assert "cifar10" in str(info.value) and "\n" not in str(info.value)
    assert not builder.data_path.exists()
    builder.fails = None  # the next attempt does not find anything prepared
    assert builder.read == []
    assert prepare("cifar10") == builder.data_path and builder.data_path.exists()
    assert sorted(builder.read) == ["test", "train"]  # decoded at once


def test_a_disk_that_is_too_small_is_an_error_before_the_download(builder, monkeypatch):
    usage = SimpleNamespace(free=100 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="^preparing cifar10 takes about 324 MiB, but .* 100 MiB; "):
        prepare("cifar10")


@pytest.fixture
def originals(tmp_path, builder):
    """A folder with two original files, as TFDS knows them."""
    folder = tmp_path / "originals"
    folder.mkdir()
    builder.url_infos = {}
    for name, content in (("a.tar.gz", b"images"), ("b.gz", b"labels")):
        (folder / name).write_bytes(content)
        info = UrlInfo(Size(len(content)), hashlib.sha256(content).hexdigest(), name)
        builder.url_infos[f"https://host/{name}"] = info
    return folder


def test_original_files_are_taken_from_a_folder(builder, originals, capfd):
    assert prepare("cifar10", originals=str(originals)) == builder.data_path
    assert builder.options["download_config"].manual_dir == str(originals)
    said = capfd.readouterr().err
    assert said == f"reading the original files of cifar10 in {originals}\n"
    builder.options = {}
    prepare("cifar10", originals=str(originals))  # prepared already
    assert builder.options == {}


def test_files_that_are_missing_are_named_before_any_work(builder, originals, run):
    (originals / "a.tar.gz").unlink()
    done = run("data", "prepare", "cifar10", f"--from={originals}")
    lacks = "lacks 1 of the 2 original files of cifar10: a.tar.gz"
    said = f"jdm data prepare: --from='{originals}' {lacks}\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert done.stdout.splitlines()[-1] == "a.tar.gz: https://host/a.tar.gz"
    assert not builder.data_path.exists()


@pytest.mark.parametrize("content", [b"image$", b"images and more"])
def test_a_file_with_another_checksum_is_named(builder, originals, content):
    (originals / "a.tar.gz").write_bytes(content)
    said = "holds a.tar.gz, which is not the original file: its SHA-256 is "
    with pytest.raises(InvalidValue, match=said):
        prepare("cifar10", originals=str(originals))
    assert not builder.data_path.exists()


def test_original_files_go_with_downloaded_sets(builder, originals):
    with pytest.raises(InvalidValue, match="does not go with digits, which is not downloaded"):
        prepare("digits", originals=str(originals))
    with pytest.raises(InvalidValue, match="^from='/absent' is not a folder$"):
        prepare("cifar10", originals="/absent")


@pytest.mark.parametrize("locks", [True, False])
def test_two_that_prepare_a_folder_at_once(tmp_path, monkeypatch, capfd, locks):
    """Both have found that nothing is prepared before one begins."""
    for i in range(4):
        path = tmp_path / "pets" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
    name, data = f"folder:{tmp_path / 'pets'}", str(tmp_path / "data")
    both, written, write = threading.Barrier(2), [], module._prepare_records

    def slow(*args):
        written.append(args)
        time.sleep(0.3) if locks else both.wait(60)
        write(*args)

    monkeypatch.setattr(module, "_check_possible", lambda *args: both.wait(60))
    monkeypatch.setattr(module, "_prepare_records", slow)
    if not locks:
        monkeypatch.setattr(module, "one_at_a_time", lambda *args: contextlib.nullcontext())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepare, [name] * 2, [data] * 2)
    assert first == second and len(written) == (1 if locks else 2)
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name]
    assert len(load_split(name, "train", ReadOptions(data, 8, 1)).images) == 4
    waited = f"waiting for another process, which prepares {name}\n" in capfd.readouterr().err
    assert waited == locks
