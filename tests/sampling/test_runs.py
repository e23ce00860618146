"""Large runs through the command line: interrupted, resumed, on several hosts."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jdm
from jdm.diffusion.method import Method, method_of
from jdm.sampling import runs
from jdm.sampling.request import check_request
from jdm.sampling.samples import differences

JDM = Path(sys.executable).with_name("jdm")
REQUEST = ("--seeds=0-599", "--labels=0-9", "--guidance=pixel", "--steps=2", "--batch_size=32")


def command(tiny, out, *flags):
    return ["sample", f"--checkpoint={tiny}", f"--out={out}", *REQUEST, *flags]


def parts(out: Path) -> list[Path]:
    return sorted(out.with_name(f"{out.name}.parts").glob("*.npz"))


@pytest.fixture(scope="module")
def whole(joint):
    """What 600 images look like without any interruption."""
    labels = np.arange(600) % 10
    return jdm.sample(joint, labels=labels, guidance="pixel", steps=2, batch_size=32)


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory) -> Path:
    """A run that was killed after its first part: the path it was to write."""
    out = tmp_path_factory.mktemp("runs") / "x.npz"
    process = subprocess.Popen([JDM, *command(tiny, out)], stderr=subprocess.DEVNULL)
    while not parts(out):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return out


def test_a_killed_run_is_resumed(run, tiny, killed, whole, assert_same_images):
    assert not killed.exists() and 1 <= len(parts(killed)) < 3
    first = parts(killed)[0]
    made = first.stat().st_mtime_ns

    done = run(*command(tiny, killed))
    assert done.returncode == 2 and "--resume continues it" in done.stderr
    done = run(*command(tiny, killed, "--resume", "--scale=3"))
    assert done.returncode == 2 and "other settings: scale: 6.0 -> 3.0" in done.stderr
    assert first.stat().st_mtime_ns == made and not killed.exists()

    # Parts that exist are not generated again: one with other images is kept as it is.
    with np.load(first) as saved:
        arrays = dict(saved)
    arrays["images"] = np.zeros_like(arrays["images"])
    np.savez(first, **arrays)
    done = run(*command(tiny, killed, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "wrote 600 images" in done.stdout
    with np.load(killed) as saved:
        assert (saved["arr_0"][:256] == 0).all()
        assert_same_images(saved["arr_0"][256:], whole.images[256:])
        np.testing.assert_array_equal(saved["labels"], np.arange(600) % 10)
        np.testing.assert_allclose(saved["probabilities"][256:], whole.probabilities[256:], 1e-2)
        settings = json.loads(str(saved["settings"]))
    assert settings["images"] == 600 and settings["checkpoint"] == str(tiny)
    assert [path.name for path in killed.parent.iterdir()] == ["x.npz"]
    again = run(*command(tiny, killed, "--resume"))
    assert again.returncode == 0 and "is complete already" in again.stdout
    other = run(*command(tiny, killed, "--resume", "--scale=3"))
    assert other.returncode == 2 and "is complete, and of other settings: scale: 6" in other.stderr


def test_two_hosts_write_a_part_each(tiny, tmp_path, whole, assert_same_images):
    """Two processes of two devices each, through jax.distributed; the folder is shared."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "folder"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    hosts = [
        subprocess.Popen(
            [
                JDM,
                *command(tiny, out, f"--coordinator=localhost:{port}"),
                "--processes=2",
                f"--process={host}",
            ],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    for process in hosts:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    from PIL import Image

    images = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
    assert_same_images(np.stack(images)[..., None], whole.images)


def test_a_part_that_does_not_open_is_generated_again(joint, whole, tmp_path, assert_same_images):
    method = Method(guidance="pixel", steps=2)
    request = check_request(joint, labels=np.arange(96) % 10, method=method)
    settings, out, cut = request.settings(joint), tmp_path / "x.npz", []

    def go_on():
        return runs.run(joint, request, settings, out, resume=True, batch_size=32)

    def cut_off(where):  # at the end, as a full disk would
        if where == "all parts are there" and not cut:
            cut.extend(parts(out))
            raise OSError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.distributed, "barrier", cut_off)
        patch.setattr(runs, "LEAST", 32)
        with pytest.raises(OSError):
            go_on()
    assert len(cut) == 3
    cut[0].write_bytes(b"")
    cut[1].write_bytes(cut[1].read_bytes()[:-1000])
    for name in ("Thumbs.db", "notes.txt"):
        (cut[0].parent / name).write_text("mine")
    assert go_on()
    assert [path.name for path in cut[0].parent.iterdir()] == ["notes.txt"]  # a person's stay
    with np.load(out) as saved:
        assert_same_images(saved["arr_0"], whole.images[:96])


def check_out(out, resume=False):
    runs.check_out(out, {"steps": 3}, resume)


def test_parts_without_a_record_are_not_taken_for_those_of_this_run(tmp_path):
    check_out(tmp_path / "x.npz")
    (tmp_path / "x.npz.parts").mkdir()
    (tmp_path / "x.npz.parts" / "request.json.partial").write_text("{")
    check_out(tmp_path / "x.npz")  # cut off before there was anything to keep
    (tmp_path / "x.npz.parts" / "00000000.npz").write_bytes(b"of another run")
    for resume in (False, True):
        with pytest.raises(ValueError, match="x.npz.parts is in the way, and holds no interrupted"):
            check_out(tmp_path / "x.npz", resume)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {"steps": 3}}'])
def test_a_damaged_record_is_one_sentence_that_names_it(tmp_path, content):
    record = tmp_path / "x.npz.parts" / "request.json"
    record.parent.mkdir()
    record.write_text(content)
    with pytest.raises(ValueError, match=rf"cannot be continued: {record} is damaged: ") as info:
        check_out(tmp_path / "x.npz", resume=True)
    assert "\n" not in str(info.value) and record.read_text() == content


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(ValueError, match=r"is a folder, and \.npz a file"):
        check_out(tmp_path / "x.npz")
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", resume=True)


def test_what_a_run_is_known_by(joint):
    def settings(joint, **options):
        names = ("n", "labels", "seeds", "classifier")
        given = {"labels": [1]} | {k: v for k, v in options.items() if k in names}
        rest = {k: v for k, v in options.items() if k not in names}
        method = method_of(None, {"guidance": "pixel"} | rest)
        request = check_request(joint, method=method, **given)
        return request.settings(joint, checkpoint="runs/a")

    same = settings(joint)
    assert same == settings(joint) == json.loads(json.dumps(same))
    heavier = jax.tree.map(lambda x: x + 1, joint.weights)
    other = dataclasses.replace(joint, weights=heavier)
    changed = [
        settings(joint, seeds=[5]),
        settings(joint, labels=[2]),
        settings(joint, n=2),
        settings(joint, steps=np.int64(4), sampler="ddim", eta=np.float32(0.5)),
        settings(other),
        settings(joint, classifier=joint),
        settings(joint, classifier=other),
    ]
    texts = {json.dumps(one, sort_keys=True) for one in [same, *changed]}
    assert len(texts) == 8
    for one in changed:
        assert differences(same, one)
    assert not differences(same, {**same, "checkpoint": "runs/a/checkpoints/100"})
