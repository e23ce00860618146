"""Every path that a user can give is understood in the same way, wherever it is given."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jdm
from jdm import convert, trainer
from jdm.config import load_config
from jdm.data.lookup import dataset
from jdm.data.prepare import prepare
from jdm.data.records import is_prepared
from jdm.data.splits import ReadOptions, load_split
from jdm.errors import InvalidValue
from jdm.files import local_path, location


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("x", "x"),
        ("./digits", "./digits"),
        ("~/x", "/home/me/x"),
        ("$RUNS/x", "/runs/x"),
        ("a/${RUNS}", "a//runs"),
        ("file:///a/b", "/a/b"),
        ("file://localhost/a%20b%E9", os.fsdecode(b"/a b\xe9")),
        (Path("file:///a/b"), "/a/b"),
        ("a~b", "a~b"),
        ("5$", "5$"),
        ("C:/x", "C:/x"),
    ],
)
def test_what_a_path_means(given, means, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    assert local_path("out", given) == means


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gs://b/run", "out='gs://b/run' is in a bucket; a local path is needed here"),
        (Path("s3://b/run"), "out='s3:/b/run' begins with s3://, which is not supported; a local"),
        ("https://x.org/y", "begins with https://"),
        ("file://other/x", "is a file of the host other"),
        ("$ABSENT_/x", "out='$ABSENT_/x' names the environment variable ABSENT_, which is not set"),
        ("~nobody_here/x", "names a user who does not exist; ./~nobody_here/x is"),
        ("", "out is empty; a path is needed"),
    ],
)
def test_a_path_that_is_not_local_is_one_sentence(given, said):
    with pytest.raises(InvalidValue) as info:
        local_path("out", given)
    assert said in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("gs://bkt/run", "gs://bkt/run"),
        (Path("gs://bkt/run/"), "gs://bkt/run"),  # pathlib has made one slash of two
        ("GS://b-1.x_y//a b/run//", "gs://b-1.x_y/a b/run"),
        ("gs://bucket", "gs://bucket"),
        ("./digits", "./digits"),
        ("file:///a/b", "/a/b"),
    ],
)
def test_a_work_folder_may_be_in_a_bucket(given, means):
    assert location("workdir", given) == means


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gs://", "workdir='gs://' is not the address of a folder in a bucket: gs://bucket/folder"),
        ("gs://B/x", "is not the address of a folder in a bucket"),
        ("gs://bucket/a[1]", "has '[' in its name, which is not allowed in a bucket"),
        ("gs://bucket/a#1", "has '#' in its name"),
        ("gs://bucket/../x", "has '/../' in its name"),
        ("s3://bucket/x", "begins with s3://, which is not supported"),
    ],
)
def test_an_address_that_is_none_is_one_sentence(given, said):
    with pytest.raises(InvalidValue) as info:
        location("workdir", given)
    assert said in str(info.value) and "\n" not in str(info.value)


MODELS = {  # flags whose path is that of a work folder, which may be gs://
    "train --workdir": "train --config=tiny --workdir={}",
    "train config.train.init_from": "train --config=tiny --workdir=w --config.train.init_from={}",
    "sample --checkpoint": "sample --checkpoint={}",
    "sample --classifier": "sample --checkpoint=digits --classifier={}",
    "eval --checkpoint": "eval --checkpoint={}",
    "convert --checkpoint": "convert --checkpoint={} --to=x.pt",
}
FLAGS = {  # every other flag that takes a path, with a command line that has it
    "train --config": "train --config={}.py --workdir=w",
    "train config.data.dir": "train --config=tiny --workdir=w --config.data.dir={}",
    "train config.data.cache_dir": "train --config=tiny --workdir=w --config.data.cache_dir={}",
    "train config.data.name": "train --config=tiny --workdir=w --config.data.name=folder:{}",
    "train config.data.unlabelled": "train --config=tiny --workdir=w "
    "--config.data.unlabelled=folder:{}",
    "train config.eval.ood": "train --config=tiny --workdir=w --config.eval.ood=folder:{}",
    "sample --out": "sample --checkpoint=digits --out={}.png",
    "eval --out": "eval --checkpoint=digits --out={}",
    "eval --data": "eval --checkpoint=digits --data=folder:{}",
    "eval --ood": "eval --checkpoint=digits --ood=folder:{}",
    "eval --data_dir": "eval --checkpoint=digits --data_dir={}",
    "compare reports": "compare {} y",
    "compare --out": "compare x y --out={}.png",
    "convert --from": "convert --from={}.pt --config=reference/cifar10 --workdir=w",
    "convert --workdir": "convert --from=x.pt --config=reference/cifar10 --workdir={}",
    "convert --config": "convert --from=x.pt --config={}.py --workdir=w",
    "convert --to": "convert --checkpoint=digits --to={}.pt",
    "data list --data_dir": "data list --data_dir={}",
    "data prepare name": "data prepare folder:{}",
    "data prepare --data_dir": "data prepare digits --data_dir={}",
    "data prepare --from": "data prepare mnist --from={}",
    "data show name": "data show folder:{}",
    "data show --data_dir": "data show digits --data_dir={}",
    "data show --out": "data show digits --out={}.png",
}


@pytest.mark.parametrize("given", [*FLAGS, *MODELS])
def test_every_flag_that_takes_a_path_refuses_an_object_store(run, given, tmp_path):
    url, said = "gs://bucket/x", "is in a bucket; a local path"
    if given in MODELS:
        url, said = "s3://bucket/x", "begins with s3://, which is not supported; a local path"
    done = run(*(FLAGS | MODELS)[given].format(url).split(), cwd=tmp_path)
    command, _, parameter = given.rpartition(" ")
    assert done.returncode == 2
    assert done.stderr.startswith(f"jdm {command}: {parameter}='{url}"), done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


SAMPLES = jdm.Samples(np.zeros((1, 8, 8, 1), np.uint8), None, np.zeros(1, np.uint32), {})
CALLS = {  # the functions of Python that take a path: (the parameter in the error, a call)
    "jdm.load": ("path", lambda path, joint: jdm.load(path)),
    "jdm.sample": ("joint", lambda path, joint: jdm.sample(path)),
    "jdm.classify": ("joint", lambda path, joint: jdm.classify(path, [])),
    "jdm.edit": ("joint", lambda path, joint: jdm.edit(path, [], None)),
    "jdm.invert": ("joint", lambda path, joint: jdm.invert(path, [])),
    "jdm.interpolate": ("joint", lambda path, joint: jdm.interpolate(path, [0, 1])),
    "classifier": ("classifier", lambda path, joint: jdm.sample(joint, classifier=path)),
    "Samples.save": ("path", lambda path, joint: SAMPLES.save(path)),
    "train": ("workdir", lambda path, joint: trainer.train(joint.config, path)),
    "prepare": ("data_dir", lambda path, joint: prepare("digits", path)),
    "load_split": (
        "config.data.dir",
        lambda path, joint: load_split("digits", "test", ReadOptions(path)),
    ),
    "from_file": ("workdir", lambda path, joint: convert.from_file("x.pt", joint.config, path)),
    "read": ("from", lambda path, joint: convert.read(path)),
    "to_file": ("to", lambda path, joint: convert.to_file(joint, path)),
    "load_config": ("config", lambda path, joint: load_config(f"{path}.py")),
}


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


@pytest.mark.parametrize("name", CALLS)
def test_every_function_that_takes_a_path_refuses_an_object_store(name, joint):
    parameter, call = CALLS[name]
    with pytest.raises(InvalidValue, match="begins with s3://, which is not supported;") as info:
        call("s3://bucket/x", joint)
    assert info.value.parameter == parameter


def test_home_and_urls_are_understood_everywhere(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "run")
    url = f"file://{tmp_path}"
    for path in ("~/run", Path(f"{url}/run/checkpoints/2")):
        assert jdm.load(path).diffusion.steps == 50
    SAMPLES.save("~/a.npz")
    (tmp_path / "mine.py").write_text((Path(jdm.__file__).parent / "configs/tiny.py").read_text())
    assert load_config("~/mine.py") == load_config("tiny")
    load_split("digits", "test", ReadOptions(cache_dir="~/decoded"))
    for one in "ab":
        (tmp_path / "pets" / one).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "pets" / one / "0.png")
    for name in ("folder:~/pets", f"folder:{url}/pets"):
        assert prepare(name, "~/data") == prepare(f"folder:{tmp_path}/pets", f"{tmp_path}/data")
    trained = run("train", "--config=~/mine.py", "--workdir=~/run", cwd=tmp_path / "run")
    assert "run is trained already" in trained.stdout, trained.stderr
    monkeypatch.setenv("TFDS_DATA_DIR", "~/data")
    assert is_prepared("folder:$HERE/pets") and dataset("folder:~/pets").num_classes == 2
    shown = run("data", "show", "folder:~/pets", f"--out={url}/b.png", cwd=tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"run", "a.npz", "mine.py", "decoded", "pets", "data", "b.png"}
    assert not any(path.name.startswith(("~", "file:")) for path in (tmp_path / "run").iterdir())
