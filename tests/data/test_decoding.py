"""Decoding by threads and by processes: the same images, in order, or one error."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jdm.data import DataError, decoding
from jdm.data.decoding import decode
from jdm.data.images import BLOCK, decoded_split

RNG = np.random.default_rng(0)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


class Memory:
    """Records in memory."""

    path = Path("memory")

    def __init__(self, encoded: list[bytes]):
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __iter__(self):
        return iter({"image": one, "label": np.int32(i)} for i, one in enumerate(self._encoded))


@pytest.fixture(params=["threads", "processes"])
def many(request, monkeypatch) -> list[bytes]:
    """Images whose last block is not full."""
    monkeypatch.setattr(decoding, "MANY", 0 if request.param == "processes" else 10**9)
    shape = (2 * BLOCK + 5, 12, 16, 3)
    return [jpeg(one) for one in RNG.integers(0, 256, shape, dtype=np.uint8)]


def test_a_split_is_decoded_in_order(many, tmp_path):
    found, labels = decoded_split(tmp_path / "split", Memory(many), 8, 3)
    np.testing.assert_array_equal(found, [decode(one, 8, 3) for one in many])
    np.testing.assert_array_equal(labels, np.arange(len(many)))


def test_the_first_broken_image_is_named_and_no_file_is_left(many, tmp_path):
    first = BLOCK + 3
    many[first] = many[first][:200]
    many[first + 1] = b"broken too"
    with pytest.raises(DataError, match=f"^memory: image {first} cannot be decoded .*[Tt]runcated"):
        decoded_split(tmp_path / "split", Memory(many), 8, 3)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_one_sentence(tmp_path, monkeypatch):
    many = [jpeg(np.zeros((8, 8, 3), np.uint8))] * 3
    monkeypatch.setattr(decoding, "MANY", 0)
    monkeypatch.setattr(decoding.sys, "executable", "/bin/true")
    with pytest.raises(DataError, match="^a process that decodes images was killed$"):
        decoded_split(tmp_path / "split", Memory(many), 8, 3)
    assert not list(tmp_path.iterdir())
