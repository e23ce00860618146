"""Models on the hub: sent by `jdm push`, loaded from hf://owner/name, over real sockets.

The packaged model is sent, since it is small and no training is needed.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jdm
from jdm import model_file
from jdm.analysis import publish
from jdm.analysis.report import Report, to_json
from jdm.errors import Failure, InvalidValue
from jdm.hub import address, fetch
from jdm.trees import digest

JDM = Path(sys.executable).with_name("jdm")
FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def joint():
    return jdm.load("digits")


@pytest.fixture(scope="module")
def files(joint):
    """The files of the packaged model, without a card."""
    config = publish.public_config(joint)
    return model_file.encode(joint.weights, config, joint.dataset, joint.step, joint.digest)


@pytest.fixture
def push(run, hub, logged_in):
    """push(*flags): the command, to me/digits, with its output."""
    return lambda *flags: run("push", "--checkpoint=digits", "--to=hf://me/digits", *flags)


def test_what_was_pushed_has_the_same_weights_and_samples(push, hub, joint):
    done = push()
    assert done.returncode == 0, done.stderr
    assert "jdm.load('hf://me/digits') reads it" in done.stdout
    (sha,) = hub.commits
    assert set(hub.commits[sha]) == FILES
    assert [one for one in hub.asked if "/commit/" in one] == [
        "POST /api/models/me/digits/commit/main"
    ]
    loaded = jdm.load("hf://me/digits")
    assert loaded.digest == joint.digest and loaded.step == joint.step
    assert loaded.class_names == joint.class_names and loaded.dataset == joint.dataset
    for a, b in zip(*map(jax.tree.leaves, (loaded.weights, joint.weights)), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b) and a.sharding == b.sharding
    drawn = [jdm.sample(one, labels=[3], steps=2).images for one in (loaded, joint)]
    assert np.array_equal(*drawn)


def test_the_commands_and_processes_of_a_user(push, hub, joint, tmp_path):
    """Sent here, sampled by another process, which downloads it."""
    assert push().returncode == 0
    out = tmp_path / "a.npz"
    flags = ["--checkpoint=hf://me/digits", "--seeds=0-1", "--steps=2", f"--out={out}"]
    done = subprocess.run([JDM, "sample", *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(out)["arr_0"], jdm.sample(joint, 2, steps=2).images)


def test_every_place_of_a_path_takes_an_address(run, hub, files, joint, tmp_path):
    sha = hub.add("me/digits", files)
    images = np.zeros((1, 8, 8, 1), np.uint8)
    assert np.array_equal(jdm.classify("hf://me/digits", images), jdm.classify(joint, images))
    assert jdm.load(Path("hf://me/digits")).digest == joint.digest  # pathlib makes one slash of two
    sampled = jdm.sample(joint, labels=[3], steps=2, classifier=f"hf://me/digits@{sha}")
    assert len(sampled) == 1
    train = ["train", "--config=digits", f"--workdir={tmp_path / 'run'}", "--dry-run"]
    done = run(*train, "--config.train.init_from=hf://me/other")
    assert done.returncode == 2
    assert "config.train.init_from='hf://me/other' does not exist" in done.stderr


def test_a_revision_is_a_branch_or_a_commit(push, hub, joint, files):
    changed = jax.tree.map(lambda x: x + 1, joint.weights)
    other = digest(jax.tree.leaves(changed))
    first = hub.add("me/digits", files)
    config = publish.public_config(joint)
    hub.commit("me/digits", "dev", model_file.encode(changed, config, {}, 7, other))
    assert jdm.load("hf://me/digits@dev").digest == other
    assert jdm.load("hf://me/digits").digest == jdm.load(f"hf://me/digits@{first}").digest
    assert jdm.load("hf://me/digits@dev", step=7).step == 7
    with pytest.raises(InvalidValue, match="step=8 is not there: hf://me/digits@dev holds step 7"):
        jdm.load("hf://me/digits@dev", step=8)


def test_a_model_is_loaded_from_the_cache_without_a_network(hub, files, settings):
    hub.add("me/digits", files)
    online = jdm.load("hf://me/digits")
    settings(HF_ENDPOINT=nobody())
    assert jdm.load("hf://me/digits").digest == online.digest


def nobody() -> str:
    """An address on this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_folder_with_the_files_is_loaded_too(files, joint, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert jdm.load(tmp_path).digest == joint.digest
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(Failure, match="are damaged: they differ from their digest"):
        jdm.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(Failure, match=r"model\.safetensors is damaged"):
        jdm.load(tmp_path)
    config = json.loads(files["config.json"])
    config["model"]["channels"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    with pytest.raises(Failure, match="does not fit its config at params/"):
        jdm.load(tmp_path)


# What a user may get wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["hf://name", "hf://", "hf://a/b/c", "hf://a/..", "hf://a/b@", "hf:///"]
)
def test_an_address_names_an_owner_and_a_model(given):
    with pytest.raises(InvalidValue, match="is not the address of a model: hf://owner/name or"):
        address("path", given)


def test_what_is_no_address():
    assert address("path", "runs/hf:/x") is None and address("path", "digits") is None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hf://me/absent", "does not exist, or is private; if it is private, log in with `hf auth"),
        ("hf://me/secret", "does not exist, or is private; if it is private, log in with `hf auth"),
        ("hf://me/digits@v9", "has no branch, tag or commit 'v9'"),
        ("hf://me/empty", "is not a model of jdm: it has no config.json"),
        ("hf://me/halves", "is not a model of jdm: it has no model.safetensors"),
        ("hf://me/llm", "is not a model of jdm: config.architectures"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(run, hub, files, path, said):
    hub.add("me/digits", files)
    hub.add("me/secret", files, private=True)
    hub.add("me/empty", {"README.md": b"nothing"})
    hub.add("me/halves", {"config.json": files["config.json"]})
    hub.add("me/llm", {"config.json": b'{"architectures": ["A"]}', "model.safetensors": b"0" * 9})
    done = run("sample", f"--checkpoint={path}")
    assert done.returncode == 2, done.stderr
    assert f"jdm sample: --checkpoint='{path}" in done.stderr and said in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(InvalidValue) as info:
        jdm.load(path)
    assert info.value.parameter == "path"
    if path != "hf://me/halves":
        assert not any("safetensors" in one for one in hub.asked)  # nothing large was fetched


def test_a_private_model_needs_the_token(hub, files, joint, logged_in):
    hub.add("me/secret", files, private=True)
    assert jdm.load("hf://me/secret").digest == joint.digest


def test_only_named_files_are_fetched(hub, files, tmp_path):
    hub.add("me/digits", files | {"evil.pkl": b"x", "modeling.py": b"x", "README.md": b"x"})
    jdm.load("hf://me/digits")
    assert not any("evil" in one or "modeling" in one for one in hub.asked)
    found = {path.name for path in (tmp_path / "hf" / "hub").rglob("snapshots/*/*")}
    assert found == set(model_file.NAMES)


def test_all_files_are_of_one_commit(hub, files):
    """Also where the branch moves on while they are fetched."""
    hub.add("me/digits", files)
    at = address("path", "hf://me/digits")
    newer = {"model.safetensors": b"newer"}
    found = fetch("path", at, model_file.NAMES, lambda _: hub.commit("me/digits", "main", newer))
    assert (found / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_no_network_and_no_library_are_one_sentence(run, settings, logged_in):
    settings(HF_ENDPOINT=nobody())
    for argv in (
        ["sample", "--checkpoint=hf://me/x"],
        ["push", "--checkpoint=digits", "--to=hf://me/x"],
    ):
        done = run(*argv)
        assert done.returncode == 1 and "cannot be reached" in done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
        done = run("sample", "--checkpoint=hf://me/x")
    assert done.returncode == 1
    assert done.stderr == "jdm sample: hf:// needs huggingface_hub: pip install 'jdm[hub]'\n"


# Pushing ------------------------------------------------------------------------------------------


def test_push_needs_a_token_and_a_place_that_is_ones_own(run, hub, monkeypatch):
    flags = ["push", "--checkpoint=digits"]
    done = run(*flags, "--to=hf://me/digits")
    assert done.returncode == 2 and "cannot be written to without a token; run `hf" in done.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    done = run(*flags, "--to=hf://you/digits")
    assert done.returncode == 2 and "may not be used with this token" in done.stderr, done.stderr
    done = run(*flags, "--to=runs/x")
    assert done.returncode == 2 and "--to='runs/x' is not the address of a model" in done.stderr
    assert not hub.commits


def test_push_spares_what_is_not_its_own(push, hub, files):
    hub.add("me/digits", {"pytorch_model.bin": b"x"})
    done = push()
    assert done.returncode == 2
    assert "is not a model of jdm: it holds pytorch_model.bin; choose a new name" in done.stderr
    assert len(hub.commits) == 1


def test_private_is_kept(push, hub):
    done = push("--private")
    assert done.returncode == 0 and hub.repositories["me/digits"]["private"]
    hub.repositories["me/digits"]["private"] = False
    done = push("--private")
    assert done.returncode == 2 and "is a public repository, and stays public" in done.stderr
    assert len(hub.commits) == 1


@pytest.mark.parametrize("where", ["/upload/", "/commit/"])
def test_an_upload_that_breaks_off_leaves_nothing(push, hub, where):
    hub.broken = [where]
    done = push()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    # Deprecations in libraries are warnings under pytest.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 2 and "hf://me/digits" in lines[1] and not hub.commits


def test_a_licence_that_the_hub_does_not_know(push, hub):
    done = push("--license=nonsense")
    assert done.returncode == 2 and '"license" must be one of' in done.stderr, done.stderr
    assert not hub.commits
    assert push("--license=mit").returncode == 0
    assert b"\nlicense: mit\n" in hub.files("me/digits")[1]["README.md"]


# The model card -----------------------------------------------------------------------------------

PROTOCOL = dict(
    checkpoint="/home/me/runs/digits", step=2400, data="digits", split="test", images=360, seed=0
)


def report_of(joint, **changed):
    protocol = PROTOCOL | {"weights": joint.digest} | changed
    return Report(protocol, {"classification": {"accuracy": 0.9861}})


def test_the_card_says_how_to_load_and_what_was_measured(push, hub, joint, tmp_path):
    (tmp_path / "report.json").write_text(to_json(report_of(joint)))
    done = push(f"--report={tmp_path}")
    assert done.returncode == 0, done.stderr
    card = hub.files("me/digits")[1]["README.md"].decode()
    assert card.startswith("---\n") and "\nlibrary_name: jdm\n" in card
    assert "license" not in card.partition("\n---\n")[0]
    assert 'joint = jdm.load("hf://me/digits")' in card and "pip install 'jdm[hub]'" in card
    assert "value: 0.9861" in card and "type: accuracy" in card  # in the header
    assert "Step 2400, digits test (360 images), seed 0." in card  # beside the number
    assert "| accuracy | 0.9861 | higher |" in card and "Trained on `digits`." in card
    assert joint.digest in card and "/home/me" not in card


def test_a_report_of_other_weights_is_refused(push, hub, joint, tmp_path):
    (tmp_path / "report.json").write_text(to_json(report_of(joint, weights="0" * 16)))
    done = push(f"--report={tmp_path}")
    assert done.returncode == 2 and "is of other weights: those of step 2400" in done.stderr
    assert not hub.commits


def test_the_report_in_the_work_folder_is_found(run, hub, logged_in, tiny, tmp_path):
    """And one that is of other weights is left out, with a line that says so."""
    import shutil

    work = tmp_path / "work"
    shutil.copytree(tiny, work, ignore=shutil.ignore_patterns("train_state", "events*"))
    joint = jdm.load(work)
    (work / "report.json").write_text(to_json(report_of(joint)))
    flags = ["push", f"--checkpoint={work}", "--to=hf://me/tiny"]
    assert run(*flags).returncode == 0
    assert "0.9861" in hub.files("me/tiny")[1]["README.md"].decode()
    (work / "report.json").write_text(to_json(report_of(joint, weights="0" * 16)))
    done = run(*flags)
    assert done.returncode == 0 and "the model card has no figures: report=" in done.stderr
    assert "no report came with this model" in hub.files("me/tiny")[1]["README.md"].decode()


def test_no_path_of_this_machine_is_published(joint):
    import dataclasses

    config = joint.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.update(name="folder:/home/me/pets/", dir="/home/me/a", cache_dir="/home/me/b")
        config.data.unlabelled, config.eval.ood = "folder:/home/me/more", "folder:/home/me/cars"
        config.train.init_from = "/home/me/runs/first"
    dataset = dict(joint.dataset) | {"name": "folder:/home/me/pets"}
    dataset["unlabelled"] = {"name": "folder:/home/me/more", "class_names": []}
    own = dataclasses.replace(joint, config=config, dataset=dataset)
    at = address("to", "hf://me/pets")
    report = publish.public_report(report_of(joint, data="folder:/home/me/pets"), at)
    texts = [json.dumps(publish.public_config(own)), json.dumps(publish.public_dataset(own))]
    texts.append(publish.card(own, at, report, None))
    assert not any("/home/me" in text for text in texts)
    assert "folder:pets" in texts[2] and '"init_from": "first"' in texts[0]
