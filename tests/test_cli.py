"""The commands: what they write, print and exit with.

A process takes seconds to start, so most tests `run` a command in this one. `start` is a real
process, for what only a process can show.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import jdm
from jdm.data.datasets import DATASETS
from jdm.data.splits import ReadOptions, load_split

JDM = Path(sys.executable).with_name("jdm")


def start(*argv, **kwargs) -> subprocess.CompletedProcess:
    """`jdm` with these arguments, in a process of its own."""
    return subprocess.run(
        [JDM, *map(str, argv)], capture_output=True, text=True, timeout=300, **kwargs
    )


def assert_one_sentence(done, status, said):
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_train_sample_eval(run, tmp_path):
    workdir = tmp_path / "run"
    train = ["train", "--config=tiny", f"--workdir={workdir}", "--config.train.steps=2"]
    train += ["--config.model.multipliers=(1,)", "--config.model.attention=()"]  # compiled sooner
    done = start(*train)
    assert done.returncode == 0, done.stderr
    assert "compiling the training step" in done.stdout and "step 2" in done.stderr
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr

    out = tmp_path / "samples.npz"
    done = run(
        "sample",
        f"--checkpoint={workdir}",
        "--seeds=0-4,9",
        "--labels=0,1,2",
        "--guidance=representation",
        "--steps=2",
        "--threshold=none",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as saved:
        assert list(saved["labels"]) == [0, 1, 2, 0, 1, 2]  # cycled over the seeds
        assert list(saved["seeds"]) == [0, 1, 2, 3, 4, 9]
        same = jdm.sample(
            workdir,
            labels=saved["labels"],
            seeds=saved["seeds"],
            guidance="representation",
            steps=2,
            threshold="none",
        )
        np.testing.assert_array_equal(saved["arr_0"], same.images)

    done = run("eval", f"--checkpoint={workdir}", f"--out={tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["protocol"]["split"] == "test" and report["protocol"]["images"] == 360
    assert f"accuracy       {report['results']['classification']['accuracy']:.4f}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--config=digits"], "--workdir"),
        (["train", "--config=digit", "--workdir=w"], "--config='digit' is unknown; known: digits"),
        (["train", "--config=tiny", "--workdir=w", "--config.optim.lrr=1"], "optim.lr"),
        (
            ["train", "--config=tiny", "--workdir=w", "--config.train.steps=x"],
            "config.train.steps='x' must be a whole number",
        ),
        (
            ["train", "--config=tiny", "--workdir=w", "--config.diffusion.schedule=exp"],
            "config.diffusion.schedule='exp' is unknown; known: linear, linear_ddpm, cosine",
        ),
        (["train", "--config=tiny", "--workdir=w", "--config.data.name=mnits"], "known: digits"),
        (
            ["train", "--config=tiny", "--workdir=w", "--config.data.unlabelled=minst"],
            "config.data.unlabelled='minst' is unknown; known: digits, mnist,",
        ),
        (["train", "--config=tiny", "--workdir=w", "--dryrun"], "--dryrun"),
        (["train", "--config=tiny", "--workdir=w", "--config.train.steps"], "needs a value"),
        (["train", "--config=tiny", "--workdir=w", "--config.model.attention=(3,)"], "contains 3"),
        (["sample", "--checkpoint=w", "--seeds=a-b"], "--seeds='a-b' is not a list"),
        (
            ["sample", "--checkpoint=w", "--out=absent/x.png"],
            "--out='absent/x.png' cannot be written",
        ),
        (["sample", "--checkpoint=absent"], "--checkpoint='absent' cannot be loaded: no"),
        (["sample", "--checkpoint=w", "--config.optim.lr=1"], "goes with --config"),
        (["eval", "--checkpoint=absent"], "--checkpoint='absent' cannot be loaded: no"),
        (
            ["convert", "--from=x.pt", "--workdir=w"],
            "either --from, --config and --workdir, or",
        ),
        (
            ["convert", "--from=x.pt", "--to=y.pt"],
            "either --from, --config and --workdir, or",
        ),
        (
            ["convert", "--checkpoint=w", "--to=absent/x.pt"],
            "--to='absent/x.pt' cannot be written: the folder",
        ),
        (
            ["convert", "--from=x.pt", "--config=tiny", "--workdir=w", "--config.model.head=x"],
            "config.model.head='x' is unknown",
        ),
        (
            ["convert", "--from=x.pt", "--config=reference/cifar10", "--workdir=w"],
            "--from='x.pt' is not a file",
        ),
        (["samples"], "samples"),
        (["data"], "action"),
        (["data", "prepare", "minst"], "name='minst' is unknown; known: digits, mnist, "),
        (["data", "prepare", "folder:w"], "name='folder:w' is not a folder"),
        (["data", "prepare", "digits", "--size=0"], "--size=0 must be positive"),
        (["data", "show", "digits", "--out=x.jpg"], "--out='x.jpg' must end in .png"),
        (["data", "show", "digits", "--split=val"], "--split='val' is unknown; digits has train"),
    ],
)
def test_what_is_typed_wrong_is_one_sentence_and_status_2(run, argv, said, tmp_path):
    assert_one_sentence(run(*argv, cwd=tmp_path), 2, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=x.jpg"], "--out='x.jpg' must end in one of .png, .npz, .gif, or be a folder"),
        (["--labels=3,10", "--guidance=pixel"], "--labels hold 10"),
        (["--guidance=dual", "--labels=1"], "--guidance='dual' is unknown; known: none, pixel,"),
        (["--labels=0-9", "--guidance=pixel", "--seeds=0-3"], "--labels are 10 for 4 seeds; at mo"),
        (["--labels=3:0.5+4:x"], "--labels='3:0.5+4:x' is not a list such as 0-9, 3,none,5,"),
        (["--labels=3:0.5", "--guidance=pixel"], "--labels hold the probabilities"),
        (["--labels=3+!5", "--guidance=pixel"], "--labels ask for a class to be off; an image has"),
        (["--labels=3:0.5+3:0.5"], "--labels='3:0.5+3:0.5' names a class twice in 3:0.5+3:0.5"),
        (["--seeds=0-9999999999"], "--seeds='0-9999999999' has 9999999999; it must be below 2**32"),
        (["--seeds=9-5,0"], "--seeds='9-5,0' has the range 9-5, whose end is before its start"),
        (
            ["--labels=1", "--guidance=representation", "--blocks=top"],
            "--blocks='top' is unknown; known: mid",
        ),
        (["--steps=10,60"], "--steps='10,60' asks for 60 of the 25"),
    ],
)
def test_bad_sampling_flags(run, tiny, flags, said, tmp_path):
    assert_one_sentence(run("sample", f"--checkpoint={tiny}", *flags, cwd=tmp_path), 2, said)
    assert list(tmp_path.iterdir()) == []


def test_python_m_jdm_is_the_command_and_knows_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "jdm", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"jdm {jdm.__version__}\n")


def test_another_config_in_the_folder(run, tiny, tmp_path):
    workdir = shutil.copytree(tiny, tmp_path / "run")
    done = run("train", "--config=tiny", f"--workdir={workdir}", "--config.optim.b1=0.5")
    assert_one_sentence(done, 2, "optim.b1: 0.9 -> 0.5")


@pytest.mark.parametrize("damage", ["flip", "truncate", "half-written"])
def test_a_damaged_checkpoint(run, tiny, tmp_path, damage):
    workdir = shutil.copytree(tiny, tmp_path / "run")
    folder = workdir / "checkpoints" / "4"
    files = [path for path in (folder / "weights").rglob("*") if path.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        (folder / "checksums.json").unlink()
    done = run("sample", f"--checkpoint={workdir}", "--steps=2", cwd=tmp_path)
    assert_one_sentence(done, 2, "checkpoints/4")


def test_batch_that_does_not_divide_by_the_devices(tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = start("train", "--config=tiny", "--workdir=w", cwd=tmp_path, env=env)
    assert_one_sentence(done, 2, "data.batch_size=16 does not divide by the 3 devices")


def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints(run, tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        full = shutil.copytree(tiny, disk / "run")
        shutil.rmtree(full / "checkpoints" / "4")  # a run that stands at step 2
        (disk / "filler").write_bytes(b"0" * (shutil.disk_usage(disk).free - 200_000))
        done = run("train", "--config=tiny", f"--workdir={full}")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"jdm train: could not save {full}")
        assert sorted(p.name for p in (full / "checkpoints").iterdir()) == ["2"]
        jdm.load(full)
        (disk / "filler").unlink()
        # Room again: the same command goes on.
        assert run("train", "--config=tiny", f"--workdir={full}").returncode == 0
        assert jdm.checkpoint.steps(full)[-1] == 4
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "command",
    [
        *("train", "sample", "eval", "compare", "probe", "explain", "convert"),
        *("data", "data list", "data prepare", "data show"),
    ],
)
def test_help_has_an_example(run, command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0 and f"example: jdm {command}" in " ".join(done.stdout.split())


# Data ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10(photographs, tmp_path_factory) -> Iterator[Path]:
    """A data_dir that holds a tenth of the real images, as TFDS stores CIFAR-10."""
    if not photographs.is_file():
        pytest.skip(f"{photographs} is not there; JDM_SHARED says where else it may be")
    with tarfile.open(photographs) as archive:
        images = [
            (member.name.split("/")[1], archive.extractfile(member).read())
            for member in archive
            if member.isfile()
        ]

    names, kept = sorted({name for name, _ in images}), []
    for name in names:
        kept += [one for one in images if one[0] == name][:500]

    def generate(some):
        for i, (name, image) in enumerate(some):
            yield f"{i:05}", {"id": f"{i:05}", "image": image, "label": names.index(name)}

    data_dir = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder("cifar10", data_dir=data_dir, file_format="array_record")
    splits = {"train": generate(kept), "test": generate(kept[::5])}
    with mock.patch.object(type(builder), "_split_generators", lambda *args: splits):
        builder.download_and_prepare()
    sizes = {"train": len(kept), "test": len(kept[::5])}
    with mock.patch.dict(DATASETS["cifar10"].splits, sizes):
        yield data_dir


SMALL = ("channels=8", "multipliers=(1,)", "blocks=1", "attention=()", "heads=2", "dropout=0.0")


def test_cifar10_as_tfds_stores_it(run, cifar10, tmp_path):
    done = run("data", "list", f"--data_dir={cifar10}")
    rows = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()}
    assert rows["cifar10"] == "yes" and rows["cifar100"] == "no"

    picture = tmp_path / "grid.png"
    done = run("data", "show", "cifar10", f"--data_dir={cifar10}", f"--out={picture}")
    assert done.returncode == 0, done.stderr
    assert "up to 8 images of each of 10 classes" in done.stdout
    images, labels = load_split("cifar10", "train", ReadOptions(str(cifar10)))
    assert images.shape == (5_000, 32, 32, 3) and np.bincount(labels).tolist() == [500] * 10
    with Image.open(picture) as drawn:
        scale = round(drawn.width / (10 * 33 - 1))
        corner = np.asarray(drawn.convert("RGB"))[: 32 * scale : scale, : 32 * scale : scale]
    np.testing.assert_array_equal(corner, images[labels == 0][0])

    workdir = tmp_path / "run"
    done = run(
        "train",
        "--config=reference/cifar10",
        f"--workdir={workdir}",
        *(f"--config.model.{change}" for change in SMALL),
        f"--config.data.dir={cifar10}",
        "--config.data.batch_size=8",
        "--config.data.validation=0.01",
        "--config.data.labelled_per_class=10",
        "--config.eval.split=validation",
        "--config.train.steps=1",
        "--config.loss.augment=none",
    )
    assert done.returncode == 0, done.stderr
    assert "training on 4,950 images, 100 of them labelled; evaluating on 50 (val" in done.stdout
    assert jdm.checkpoint.steps(workdir) == [1]


def test_a_folder_of_ones_own(run, tiny, tmp_path):
    """Prepared, shown, trained on, evaluated; and a model of other images is evaluated on it."""
    images, labels = load_split("digits", "validation")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "mine" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).resize((20, 20), Image.Resampling.BOX).save(path)
    name, where = f"folder:{tmp_path / 'mine'}", f"--config.data.dir={tmp_path / 'data'}"
    train = ["train", "--config=tiny", f"--workdir={tmp_path / 'run'}", where]
    train += [f"--config.data.name={name}", "--config.data.validation=0.2"]
    train += ["--config.train.steps=2"]
    done = run(*train)
    assert_one_sentence(done, 1, f"run jdm data prepare {name} --data_dir={tmp_path / 'data'}")
    assert not (tmp_path / "run").exists()

    done = run("data", "prepare", name, f"--data_dir={tmp_path / 'data'}")
    assert done.returncode == 0, done.stderr
    done = run(*train)
    assert done.returncode == 0, done.stderr
    assert "training on 144 images, 144 of them labelled; evaluating on 36" in done.stdout
    done = run("eval", f"--checkpoint={tmp_path / 'run'}", "--split=validation")
    assert done.returncode == 0 and "images         36" in done.stdout, done.stderr

    data = (f"--data={name}", "--split=train", f"--data_dir={tmp_path / 'data'}")
    done = run("eval", f"--checkpoint={tiny}", *data, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["protocol"]["data"] == name


def test_a_broken_image_is_named(run, tmp_path):
    for one in "ab":
        (tmp_path / "mine" / one).mkdir(parents=True)
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "PNG")
        (tmp_path / "mine" / one / "0.png").write_bytes(buffer.getvalue())
    (tmp_path / "mine" / "a" / "1.png").write_bytes(buffer.getvalue()[:40])
    prepare = ["data", "prepare", f"folder:{tmp_path / 'mine'}", f"--data_dir={tmp_path / 'data'}"]
    done = run(*prepare)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 of 3 images in " in done.stderr.splitlines()[-1] and "a/1.png (" in done.stderr
    assert run(*prepare, "--skip-broken").returncode == 0
