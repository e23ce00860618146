"""What the preparation of a data set refuses, and which files it leaves."""

import errno
import shutil
from types import SimpleNamespace

import pytest

from jdm.data import DataError
from jdm.data import prepare as module
from jdm.data.prepare import prepare


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

    def download_and_prepare():
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
