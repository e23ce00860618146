"""jdm.convert: names and bytes both ways, and the errors for files that cannot be converted."""

import collections
import io
import json
import os
import pickle
import sys
import warnings

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import jdm
from jdm import checkpoint, cli, convert, trainer
from jdm.config import config_from_dict, flatten, load_config
from jdm.errors import Failure, InvalidValue
from jdm.nn.model import make_model, weight_shapes
from jdm.torch_files import FORMATS

torch = pytest.importorskip("torch", reason="PyTorch (the extra torch) reads and writes the files")


def config_of(*overrides: str):
    """A config of a small network that compiles fast, with the published head."""
    small = ("model.multipliers=(1,)", "model.attention=()", "loss.classify=noised")
    plain = ("model.dropout=0.0", "model.head_dropout=0.0", "optim.clip_norm=0.0")
    settings = ("model.head=published", *small, *plain, *overrides)
    return load_config("tiny", [f"--config.{setting}" for setting in settings])


CONFIG = config_of()
MODEL = make_model(CONFIG.model, CONFIG.exec)


def state_dict(model=MODEL, seed: int = 0, head: bool = True) -> dict:
    """Random weights as the published implementation would save them."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(
            np.array(rng.integers(1, 99))
            if entry.array.dtype == np.int64
            else rng.uniform(0.5, 1.5, entry.array.shape).astype(np.float32)
        )
        for name, entry in convert.entries(model, head).items()
    }


STATE = state_dict()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "model.pt"
    torch.save(STATE, path)
    return path


@pytest.fixture(scope="module")
def ported(file, tmp_path_factory):
    """The work folder of the file."""
    workdir = tmp_path_factory.mktemp("ported") / "run"
    convert.from_file(file, CONFIG, workdir)
    return workdir


def assert_same_bytes(ours, theirs, ordered=True):
    assert not ordered or list(ours) == list(theirs)
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        ours_x, x = np.asarray(ours[name]), np.asarray(x)
        assert (ours_x.shape, ours_x.dtype) == (x.shape, x.dtype), name
        assert ours_x.tobytes() == x.tobytes(), name


# Both ways.


@pytest.mark.parametrize("name", ["grey28", "grey28_x0_updown", "rgb32_learned", "rgb64_neworder"])
def test_stored_files_come_back_to_the_byte(published, name):
    stored = published(name)
    model = make_model(stored.config.model, stored.config.exec)
    weights = convert.load_weights(stored.file, stored.config)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, weight_shapes(model))
    back = FORMATS[".pt"].encode(convert.state_dict(model, weights))
    theirs = torch.load(stored.file, weights_only=True)
    assert_same_bytes(torch.load(io.BytesIO(back), weights_only=True), theirs)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_work_folder_comes_back_to_the_byte(ported, ending, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / f"back{ending}"
    convert.to_file(ported, path)
    assert_same_bytes(convert.read(path), STATE, ordered=ending != ".safetensors")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if ending == ".safetensors":  # which can be read too
        weights = convert.load_weights(path, CONFIG)
        assert_same_bytes(convert.state_dict(MODEL, weights), STATE)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.multipliers=(1,2)", "model.attention=(4,)", "model.blocks=2"),
        ("model.multipliers=(1,2,2)", "model.attention=(8,)", "model.resample=resblock"),
    ],
    ids=["conv", "resblock"],
)
def test_every_array_of_ours_has_one_name(overrides):
    config = config_of(*overrides)
    model = make_model(config.model, config.exec)
    paths = [entry.path for entry in convert.entries(model, head=True).values()]
    assert len(paths) == len(set(paths)) and set(paths) == set(flatten_dict(weight_shapes(model)))


def test_an_ordered_dict_of_parameters_is_read_too(file, tmp_path):
    parameters = {n: torch.nn.Parameter(x, x.is_floating_point()) for n, x in STATE.items()}
    torch.save(collections.OrderedDict(parameters), tmp_path / "ema.pt")
    assert_same_bytes(convert.read(tmp_path / "ema.pt"), convert.read(file))


@pytest.mark.parametrize("prefix", ["model.", "module.net."])
def test_a_network_inside_another_module_is_read_too(file, tmp_path, capsys, prefix):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {f"{prefix}{name}": x for name, x in STATE.items()}}, path)
    found, expected = (convert.load_weights(at, CONFIG) for at in (path, file))
    chex.assert_trees_all_equal(found, expected)
    shown = prefix.removeprefix("module.")
    assert f"read without {shown!r} before the names" in capsys.readouterr().out
    others = {**STATE, "loss.weight": torch.zeros(2)}
    torch.save({f"{prefix}{name}": x for name, x in others.items()}, path)
    with pytest.raises(InvalidValue) as error:
        convert.load_weights(path, CONFIG)
    assert [line.split(":")[0] for line in error.value.details] == ["loss.weight"]


def test_the_work_folder_holds_weights_and_config_at_step_0(ported):
    assert checkpoint.steps(ported) == [0]
    assert checkpoint.items(ported, 0) == {"weights", "config"}
    assert config_from_dict(json.loads((ported / "config.json").read_text())) == CONFIG
    joint = jdm.load(ported)
    count = joint.weights["batch_stats"]["head"]["norm_in"]["count"]
    assert count == STATE["clasifier.bn_1.num_batches_tracked"].item()


def test_a_converted_model_is_sampled_evaluated_and_trained(ported, capsys):
    """Training starts from the converted weights, and later resumes like any other run."""
    samples = jdm.sample(ported, 1, steps=1)
    assert samples.images.shape == (1, 8, 8, 1)
    longer = config_of("train.steps=2", "checkpoint.every=1")
    trainer.train(longer, ported)
    assert "holds weights only: training starts from them, with a new optimiser" in (
        capsys.readouterr().out
    )
    rows = [json.loads(line) for line in (ported / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and "eval/accuracy" in rows[-1]
    before, after = (jdm.load(ported, step).weights for step in (0, 1))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["params"], after["params"])
    largest = max(jax.tree.leaves(moved))
    assert 0 < largest < 2 * CONFIG.optim.lr  # one step of Adam from the converted weights
    counts = [w["batch_stats"]["head"]["norm_in"]["count"] for w in (before, after)]
    assert counts[1] == counts[0] + 1
    trainer.train(config_of("train.steps=3", "checkpoint.every=1"), ported)
    assert "resuming from step 2" in capsys.readouterr().out


def test_a_failed_save_leaves_nothing_behind(file, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise checkpoint.CheckpointError("no space left")

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(checkpoint.CheckpointError):
        convert.from_file(file, CONFIG, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Files without a classifier.


@pytest.fixture
def headless(tmp_path):
    path = tmp_path / "unet.pt"
    torch.save({n: x for n, x in STATE.items() if not n.startswith("clasifier.")}, path)
    return path


def test_a_file_without_a_classifier_needs_a_flag(headless, tmp_path):
    assert "--without-head" in refused(headless, CONFIG, tmp_path / "run")
    convert.from_file(headless, CONFIG, tmp_path / "run", without_head=True)
    joint = jdm.load(tmp_path / "run")
    assert (joint.weights["batch_stats"]["head"]["norm_in"]["var"] == 1).all()
    assert np.std(joint.params["head"]["in"]["kernel"]) > 0.01
    assert joint.config.loss.terms == ("diffusion",)
    with pytest.raises(InvalidValue, match="^guidance='pixel' needs a classifier"):
        jdm.sample(joint, labels=[0], guidance="pixel")
    convert.to_file(tmp_path / "run", tmp_path / "back.pt", without_head=True)
    assert_same_bytes(convert.read(tmp_path / "back.pt"), convert.read(headless))


def test_only_the_published_head_is_converted(headless, tiny, tmp_path):
    own = load_config("tiny")
    for conversion in (
        lambda: convert.load_weights(headless, own),
        lambda: convert.to_file(tiny, tmp_path / "back.pt"),
    ):
        said = "^config.model.head='normalised' .*--without-head"
        with pytest.raises(InvalidValue, match=said):
            conversion()
    convert.to_file(tiny, tmp_path / "back.pt", without_head=True)
    names = convert.entries(make_model(own.model, own.exec), head=False)
    assert list(convert.read(tmp_path / "back.pt")) == list(names)


def test_a_file_with_a_classifier_is_not_read_without_it(file, tmp_path):
    with pytest.raises(InvalidValue, match="clasifier.bn_1.bias: the config wants nothing"):
        convert.from_file(file, CONFIG, tmp_path / "run", without_head=True)


# Bad input.


def refused(path, config, workdir) -> str:
    """The sentence of the error for a file; nothing is written."""
    before = set(workdir.parent.iterdir())
    with pytest.raises(InvalidValue) as error:
        convert.from_file(path, config, workdir)
    sentence = str(error.value)
    assert "\n" not in sentence and str(path) in sentence
    assert set(workdir.parent.iterdir()) == before
    return sentence


@pytest.mark.parametrize(
    "overrides, first, more",
    [
        (["model.channels=16"], "clasifier.bn_1.bias: the config wants float32[49], the file", 79),
        (["model.blocks=2"], "clasifier.bn_1.bias: the config wants float32[33], the file has", 32),
        (["model.num_classes=7"], "clasifier.fc_2.bias: the config wants float32[7], the file", 1),
        (["model.attention=(8,)"], "input_blocks.1.1.norm.bias: the config wants float32[8]", 17),
        (
            ["model.learned_variance=True", "diffusion.variance=learned"],
            "out.2.bias: the config wants float32[2], the file has float32[1]",
            1,
        ),
    ],
)
def test_a_config_of_another_network(file, tmp_path, overrides, first, more):
    sentence = refused(file, config_of(*overrides), tmp_path / "run")
    assert first in sentence and sentence.endswith(f"; {more} more differ")


CHANGES = {
    "other": (lambda s: {"layer1.0.conv1.weight": torch.zeros(3)}, "the file has nothing", None),
    "missing": (lambda s: s.pop("out.2.bias") and s, "out.2.bias: the config wants float32[1]", 0),
    "extra": (lambda s: {**s, "label_emb.weight": torch.zeros(3)}, "label_emb.weight", 0),
    "shape": (lambda s: {**s, "out.2.bias": torch.zeros(3)}, "the file has float32[3]", 0),
    "double": (lambda s: {n: x.double() for n, x in s.items()}, "the file has float64", None),
    "count": (
        lambda s: {**s, "clasifier.bn_2.num_batches_tracked": torch.tensor(2**31)},
        "num_batches_tracked = 2147483648, which is not a count",
        0,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_does_not_fit(tmp_path, name):
    change, said, more = CHANGES[name]
    torch.save(change(dict(STATE)), tmp_path / "model.pt")
    sentence = refused(tmp_path / "model.pt", CONFIG, tmp_path / "run")
    assert said in sentence
    assert ("more differ" in sentence) == (more is None)


def test_every_difference_is_listed(file):
    with pytest.raises(InvalidValue) as error:
        convert.load_weights(file, config_of("model.num_classes=7"))
    listed = [line.split(":")[0] for line in error.value.details]
    assert listed == ["clasifier.fc_2.bias", "clasifier.fc_2.weight"]


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_code_in_a_file_is_never_run(tmp_path, kind):
    trap, path = tmp_path / "trap", tmp_path / "model.pt"
    content = {**STATE, "more": Code(trap)}
    if kind == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["more"]))
    sentence = refused(path, CONFIG, tmp_path / "run")
    assert "code in a file is never run" in sentence and not trap.exists()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_truncated_file(ported, tmp_path, ending):
    path = tmp_path / f"model{ending}"
    convert.to_file(ported, path)
    content = path.read_bytes()
    for size in (0, 100, 20_000):
        path.write_bytes(content[:size])
        assert "damaged" in refused(path, CONFIG, tmp_path / "run")


@pytest.mark.parametrize(
    "content", [[1, 2], {"step": 3}, {1: STATE["out.2.bias"]}, STATE["out.2.bias"]]
)
def test_a_file_that_holds_something_else(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert "has no state_dict" in refused(tmp_path / "model.pt", CONFIG, tmp_path / "run")


def test_the_command_converts_both_ways_and_lists_what_differs(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command replaces
    plain, ours = flatten(load_config("tiny")), flatten(CONFIG)
    overrides = [f"--config.{key}={ours[key]}" for key in ours if ours[key] != plain[key]]
    inwards = ["convert", f"--from={file}", "--config=tiny", *overrides]
    cli.main([*inwards, f"--workdir={tmp_path / 'run'}"])
    cli.main(["convert", f"--checkpoint={tmp_path / 'run'}", f"--to={tmp_path / 'back.pt'}"])
    assert_same_bytes(convert.read(tmp_path / "back.pt"), STATE)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"wrote the weights of {file} to {tmp_path / 'run'}, as step 0",
        f"wrote the weights of {tmp_path / 'run'} to {tmp_path / 'back.pt'}",
    ]
    with pytest.raises(SystemExit) as end:
        cli.main([*inwards, "--config.model.num_classes=7", f"--workdir={tmp_path / 'other'}"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1
    said = f"jdm convert: --from={str(file)!r} does not fit the config: clasifier.fc_2.bias"
    assert err.startswith(said)
    listed = [line.split(":")[0] for line in out.splitlines()]
    assert listed == ["clasifier.fc_2.bias", "clasifier.fc_2.weight"]
    with pytest.raises(SystemExit):
        cli.main([*inwards, "--config.model.channels=16", f"--workdir={tmp_path / 'other'}"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 11 and out.endswith("\nand 70 more\n")
    assert not (tmp_path / "other").exists()


def test_wrong_paths(file, ported, tmp_path):
    assert "is not a file" in refused(tmp_path / "absent.pt", CONFIG, tmp_path / "run")
    assert "must end in one of .pt, .pth, .bin, .ckpt, .safetensors" in refused(
        tmp_path / "model.h5", CONFIG, tmp_path / "run"
    )
    with pytest.raises(InvalidValue, match="exists and is not empty"):
        convert.from_file(file, CONFIG, ported)
    with pytest.raises(InvalidValue, match="must end in one of"):
        convert.to_file(ported, tmp_path / "model.onnx")


def test_without_pytorch_the_error_names_the_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Failure, match=r"needs torch: pip install 'jdm\[torch\]'"):
        convert.read(file)
