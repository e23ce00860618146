"""jdm.config: what is read, and what is refused in which words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest

from jdm import config
from jdm.config import OPTIONS, config_from_dict, config_names, config_to_dict, differences, flatten
from jdm.config import load_config as load_named
from jdm.configs import base
from jdm.configs.base import CLASSES, DIFFERENT, LEVELS, METRIC, SEED, SIDES
from jdm.data.datasets import DATASETS
from jdm.errors import InvalidValue
from jdm.mesh import by_row, make_mesh
from jdm.names import FOLDER
from jdm.options import ANYTHING, FRACTION, NOT_NEGATIVE, POSITIVE, SHARE
from jdm.trainer import abstract_batch
from jdm.training import build

ROOT = Path(__file__).parent.parent
NAME = "tiny"  # any config will do where its values do not matter
KEYS = flatten(base.get_config())


def load(*overrides: str):
    return load_named(NAME, [f"--config.{override}" for override in overrides])


def refused(*overrides: str) -> str:
    """The sentence that these overrides are refused with."""
    with pytest.raises(InvalidValue) as error:
        load(*overrides)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def write(path, *lines: str) -> str:
    """The path of a config file that changes base with these lines."""
    body = "".join(f"    {line}\n" for line in lines)
    path.write_text(
        "from jdm.configs import base\n\n"
        f"def get_config():\n    config = base.get_config()\n{body}    return config\n"
    )
    return str(path)


# Parameters of the published network and head; those of CelebA are of the same formulas.
PUBLISHED = {
    "reference/cifar10": [52_542_979, 6_922_892],
    "reference/fashion_mnist": [8_799_105, 915_276],
    "reference/celeba": [30_301_763, 3_505_706],
}


def header(name: str) -> str:
    """The docstring of a config that was loaded."""
    return sys.modules[f"jdm.configs.{name.replace('/', '.')}"].__doc__


# The configs there are.


def network_of(name: str) -> tuple:
    """The sizes of a config's network, by which all configs with the same one are alike."""
    model = flatten(load_named(name).model)
    return tuple(value for key, value in model.items() if key != "num_classes")


# One config for each network there is.
NETWORKS = {network_of(name): name for name in reversed(config_names())}.values()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_builds(name):
    """Shapes only: nothing is computed and nothing compiled."""
    run = build.build(load_named(name), make_mesh())
    if name in PUBLISHED:
        params = run.state.params
        counts = [sum(x.size for x in jax.tree.leaves(params[part])) for part in ("unet", "head")]
        assert counts == PUBLISHED[name]
        assert "{:,} + {:,} parameters".format(*counts) in header(name)


@pytest.mark.parametrize(
    "changes", [(), ("model.multi_label=True", "exec.accumulate=2"), ("model.head=published",)]
)
def test_a_step_has_the_shapes_of_its_config(changes):
    config, mesh = load(*changes), make_mesh()
    run, batch = build.build(config, mesh), abstract_batch(config, by_row(mesh))
    assert batch["label"].shape == ((16, 10) if config.model.multi_label else (16,))
    state, metrics = jax.eval_shape(run.step, run.state, batch, jax.random.key(0))
    assert metrics["loss"][0].shape == ()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, run.state)


@pytest.mark.parametrize("name", config_names())
def test_every_named_config_fits_its_data_and_begins_with_its_command(name):
    config = load_named(name)
    if not config.data.name.startswith(FOLDER):  # of which nothing is known
        facts = DATASETS[config.data.name]
        assert config.model.image_size in facts.sizes
        assert config.model.image_channels == facts.channels
        assert config.model.num_classes == facts.num_classes
    assert f"jdm train --config={name} " in header(name)


def test_names_are_the_files_beside_base():
    assert "base" not in config_names() and NAME in config_names()
    assert config_names() == sorted(config_names())
    folder = {path.stem for path in (ROOT / "jdm" / "configs" / "reference").glob("[!_]*.py")}
    assert {name for name in config_names() if "/" in name} == {f"reference/{n}" for n in folder}
    assert {"cifar10", "cifar100", "svhn", "fashion_mnist", "celeba", "malaria"} <= folder


def test_an_unknown_config_is_one_sentence_that_lists_the_known():
    with pytest.raises(InvalidValue) as error:
        load_named("nonsense")
    assert all(name in str(error.value) for name in ("nonsense", *config_names(), ".py"))
    with pytest.raises(InvalidValue, match="config='base' is unknown"):
        load_named("base")


def test_a_path_is_a_config_too(tmp_path):
    path = write(tmp_path / "mine.py", "config.optim.lr = 0.25", "config.model.blocks = 7")
    config = load_named(path, ["--config.model.blocks=1"])
    assert (config.optim.lr, config.model.blocks) == (0.25, 1)
    with pytest.raises(InvalidValue, match=r"^config=.*none\.py' is not a file$"):
        load_named(str(tmp_path / "none.py"))


def test_a_file_that_is_no_config_is_one_sentence(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(InvalidValue, match=r"empty\.py.*get_config"):
        load_named(str(path))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["config.train.steps = 1e3"], r"fails in line 5: .*steps.*1000\.0.*int"),
        (["pass", "1 / 0"], "fails in line 6: ZeroDivisionError: division by zero"),
        (["config.optim.lr = ("], "fails in line 5: SyntaxError: .*never closed"),
        (["import nonsense"], "fails in line 5: ModuleNotFoundError: .*nonsense"),
        (["raise ValueError('one\\ntwo')"], "fails in line 5: ValueError: one two"),
        (["raise SystemExit"], "fails in line 5: SystemExit"),
        (["return"], "a get_config.. that returns NoneType; it must end in: return config"),
        (["return [config]"], "a get_config.. that returns list; it must"),
    ],
)
def test_an_error_in_a_config_file_is_one_sentence_with_its_line(tmp_path, lines, said):
    path = write(tmp_path / "mine.py", *lines)
    with pytest.raises(InvalidValue, match=rf"^config='{path}' .*{said}") as error:
        load_named(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.optim.beta = 1.0", r"config\.optim\.beta is unknown; did you mean optim\.b"),
        ("config.zebra = 1", r"config\.zebra is unknown"),
        ("del config.optim.lr", r"config\.optim\.lr is missing from .*start from base"),
        ("del config.optim", r"config\.optim\.\w+ is missing from .*start from base"),
        (
            "config.optim.unlock(); del config.optim.lr; config.optim.lr = 'fast'",
            r"config\.optim\.lr='fast' must be a number",
        ),
        ("config.loss.classify = 'all'", r"config\.loss\.classify='all' is unknown; known: clean"),
        ("config.model.blocks = 0", r"config\.model\.blocks=0 must be positive"),
    ],
)
def test_a_file_is_checked_like_the_command_line(tmp_path, line, message):
    path = write(tmp_path / "wrong.py", *line.split("; "))
    with pytest.raises(InvalidValue, match=f"^{message}") as error:
        load_named(path)
    assert "\n" not in str(error.value)


# Overrides.


def test_overrides_are_read_by_the_type_of_their_default():
    config = load(
        "optim.lr=3e-4",
        "loss.weight=1",  # a whole number where a float is due
        "model.multipliers=(1,2,4)",
        "model.image_size=32",
        "model.attention=(8,)",
        "model.learned_variance=True",
        "diffusion.variance=learned",
        "data.dir=/some/where",
    )
    assert config.optim.lr == 3e-4
    assert config.loss.weight == 1 and type(config.loss.weight) is float
    assert config.model.multipliers == (1, 2, 4) and config.model.attention == (8,)
    assert config.model.learned_variance is True
    assert config.data.dir == "/some/where"
    before, after = flatten(load()), flatten(config)
    assert sum(before[key] != after[key] for key in before) == 8


def test_whole_numbers_do_where_a_float_is_due_and_lists_where_a_tuple_is(tmp_path):
    lines = ["config.loss.weight = 1", "config.model.multipliers = [1, 3]"]
    config = load_named(write(tmp_path / "mine.py", *lines))
    assert (config.loss.weight, config.model.multipliers) == (1.0, (1, 3))


def test_an_empty_tuple_is_a_value():
    assert load("model.attention=()").model.attention == ()


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("false", False)])
def test_truth_is_written_in_either_case(text, value):
    variance = "learned" if value else "fixed_large"
    config = load(f"model.learned_variance={text}", f"diffusion.variance={variance}")
    assert config.model.learned_variance is value


def test_a_loaded_config_takes_no_new_keys():
    config = load()
    with pytest.raises((KeyError, AttributeError)):
        config.model.chanels = 3


def test_one_config_does_not_leak_into_the_next():
    load("model.blocks=5", "optim.lr=0.5")
    assert load().model.blocks != 5 and load().optim.lr != 0.5


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("optim.lrr=1", "optim.lr"),
        ("model.chanels=8", "model.channels"),
        ("modle.channels=8", "model.channels"),
        ("diffusion.step=8", "diffusion.steps"),
        ("model=8", "model."),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(typed, meant):
    key = typed.split("=")[0]
    assert re.match(rf"config\.{key} is unknown.*{re.escape(meant)}", refused(typed))


@pytest.mark.parametrize(
    "override, kind",
    [
        ("optim.lr=fast", "a number"),
        ("model.blocks=2.5", "a whole number"),
        ("model.blocks=many", "a whole number"),
        ("model.learned_variance=perhaps", "True or False"),
        ("seed=1e3", "a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_sentence(override, kind):
    sentence = refused(override)
    assert f"config.{override.split('=')[0]}" in sentence and kind in sentence
    assert override.split("=")[1] in sentence
    # Also where it is not the first of several.
    assert refused("optim.b1=0.5", override, "optim.b2=0.5") == sentence


@pytest.mark.parametrize("key", ["optim.lr", "seed", "loss.classify", "model.multipliers"])
def test_a_key_without_its_value_is_one_sentence(key):
    assert refused(key) == f"--config.{key} needs a value: --config.{key}=…"


@pytest.mark.parametrize("key", [key for key, option in OPTIONS.items() if option.names])
def test_an_unknown_name_is_one_sentence_that_lists_the_known(key):
    sentence = refused(f"{key}=nonsense")
    assert sentence.startswith(f"config.{key}='nonsense' is unknown; known: ")
    assert all(name in sentence for name in OPTIONS[key].names)


def changed(key: str, value):
    """The config with one value replaced, whatever its type."""
    found = load_named(NAME)
    section, _, name = key.rpartition(".")
    with found.unlocked(), found.ignore_type():
        (found[section] if section else found)[name] = value
    return found


def sentence_on(key: str, value) -> str:
    with pytest.raises(InvalidValue) as error:
        config.check_config(changed(key, value))
    return str(error.value)


OUT_OF_RANGE = {
    POSITIVE: (0, -1),
    NOT_NEGATIVE: (-1,),
    FRACTION: (-0.1, 1, 1.5),
    SHARE: (-0.1, 0, 1.01),
    SEED: (-1, 2**31),
    SIDES: ((0,), (-4,), (4, 2.5), ("4",)),
    LEVELS: ((), (0, 1), (1.5,), ("wide",)),
    CLASSES: ((3,), (1, 1), (-1, 2), (0.5, 1), ("cat", "dog")),
    DIFFERENT: ((),),
    METRIC: ("acuracy", "agreement/svc_real"),
}


@pytest.mark.parametrize("key", [k for k, option in OPTIONS.items() if option.rule is not ANYTHING])
def test_a_value_out_of_range_is_one_sentence(key):
    rule = OPTIONS[key].rule
    for value in OUT_OF_RANGE[rule]:
        value = type(KEYS[key])(value)
        assert sentence_on(key, value) == f"config.{key}={value!r} must be {rule.words}"


def test_ranges_hold_on_the_command_line_too():
    assert refused("model.blocks=0") == "config.model.blocks=0 must be positive"
    assert refused("model.multipliers=wide").endswith("one or more positive whole numbers")


@pytest.mark.parametrize("key", [key for key, value in KEYS.items() if type(value) is float])
def test_a_number_that_is_none_is_refused(key):
    for value in (float("nan"), float("inf")):
        assert sentence_on(key, value).startswith(f"config.{key}={value!r} must be ")


def test_a_number_in_a_file_that_no_float_holds_is_refused():
    values = config_to_dict(load())
    for key, said in (("optim.lr", "inf must be finite"), ("data.limit", "0 must be finite")):
        section, name = key.split(".")
        broken = values | {section: values[section] | {name: 10**400}}
        with pytest.raises(InvalidValue, match=rf"^config.{key}=.*{said}$"):
            config_from_dict(broken)


def test_every_key_says_what_is_allowed():
    paths = {"data.dir", "data.cache_dir", "train.init_from", "version"}
    for key, option in OPTIONS.items():
        assert option.help
        free = option.rule is ANYTHING and not option.names
        assert free == (key in paths or type(option.default) is bool), key


@pytest.mark.parametrize(
    "overrides", [("diffusion.variance=learned",), ("model.learned_variance=True",)]
)
def test_learned_variance_is_asked_for_in_both_places_or_in_neither(overrides):
    sentence = refused(*overrides)
    assert "config.model.learned_variance" in sentence
    assert "config.diffusion.variance" in sentence


def test_a_batch_divides_by_the_parts_it_is_taken_in():
    sentence = refused("data.batch_size=16", "exec.accumulate=3")
    assert sentence == "config.data.batch_size=16 does not divide by config.exec.accumulate=3"
    assert load("data.batch_size=15", "exec.accumulate=3").exec.accumulate == 3


def test_a_head_that_normalises_over_the_batch_needs_two_rows():
    sentence = refused("model.head=published", "data.batch_size=1")
    assert "config.data.batch_size=1" in sentence and "config.model.head='published'" in sentence
    assert load("data.batch_size=1").data.batch_size == 1


def test_the_keys_and_names_that_the_method_page_gives_are_there():
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    given = {key for key in re.findall(r"`(\w+\.\w+)`", page) if key.split(".")[0] in sections}
    assert len(given) > 20 and given <= set(KEYS)
    for row in page.splitlines():
        key = re.match(r"\| [^|]*\| `(\w+\.\w+)` ((?:\"\w+\"(?:, )?)+)", row)
        if key:
            assert set(re.findall(r"\w+", key[2])) <= set(OPTIONS[key[1]].names), row


# Migration.


def test_a_config_of_version_0_is_migrated():
    values = config_to_dict(load())
    for key in ("version", "exec"):
        del values[key]
    del values["eval"]["metrics"]
    values["model"] |= dict(dtype="bfloat16", remat=True)
    values["train"]["accumulate"] = 2
    for old, new in config.TERMS_0.items():
        values["loss"]["terms"] = old
        found = config_from_dict(json.loads(json.dumps(values)))
        assert found.exec.to_dict() == dict(
            dtype="bfloat16", remat="blocks", accumulate=2, attention="auto", mesh="data"
        )
        assert found.loss.terms == new and found.version == base.VERSION
        assert found.eval.metrics == ("classification",)


def test_a_newer_config_is_refused():
    with pytest.raises(InvalidValue, match="^config.version=2 is newer than 1"):
        config_from_dict(config_to_dict(load()) | {"version": 2})


@pytest.mark.parametrize(("old", "new"), config.MOVED.items())
def test_a_key_that_moved_is_read_under_its_old_name_with_a_warning(old, new, tmp_path):
    value = {"exec.dtype": "bfloat16", "exec.remat": "attention", "exec.accumulate": 4}[new]
    with pytest.warns(UserWarning, match=f"config.{old} is called config.{new} now"):
        assert flatten(load(f"{old}={value}"))[new] == value
    path = write(tmp_path / "old.py", f"config.{old} = {value!r}")
    with pytest.warns(UserWarning, match=f"config.{old} is called config.{new} now"):
        assert flatten(load_named(path))[new] == value


@pytest.mark.parametrize(("old", "new"), [(True, "blocks"), (False, "none")])
def test_a_value_that_was_renamed_is_read(old, new, tmp_path):
    for text in (f"{old}", f"{old}".lower()):
        assert load(f"exec.remat={text}").exec.remat == new
    assert load_named(write(tmp_path / "old.py", f"config.exec.remat = {old}")).exec.remat == new
    assert config.with_exec(load(), remat=old).exec.remat == new
    stored = config_to_dict(load())
    stored["exec"]["remat"] = old
    assert config_from_dict(stored).exec.remat == new


# Written and read back.


@pytest.mark.parametrize("name", config_names())
def test_a_config_survives_json(name):
    config = load_named(name, ["--config.optim.lr=3e-5", "--config.model.attention=()"])
    back = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert flatten(back) == flatten(config)
    assert {k: type(v) for k, v in flatten(back).items()} == {k: type(v) for k, v in KEYS.items()}
    assert differences(config, back) == []
    with pytest.raises((KeyError, AttributeError)):
        back.model.chanels = 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optim": {"lrr": 1.0}}, r"config\.optim\.lrr is unknown; did you mean optim\.lr\?"),
        ({"loss": {"classify": "all"}}, r"config\.loss\.classify='all' is unknown"),
        ({"model": {"blocks": -1}}, r"config\.model\.blocks=-1 must be positive"),
        ({"model": {"multipliers": []}}, r"config\.model\.multipliers=\(\) must be one or more"),
        ({"model": {"blocks": "two"}}, r"config\.model\.blocks='two' must be a whole number"),
        ({"optim": None}, r"config\.optim"),
    ],
)
def test_a_stored_config_is_checked_like_any_other(change, message):
    values = config_to_dict(load())
    for section, keys in change.items():
        values[section] = keys if keys is None else values[section] | keys
    with pytest.raises(InvalidValue, match=f"^{message}") as error:
        config_from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", KEYS)
def test_resuming_may_change_how_long_and_what_is_kept_and_nothing_else(key):
    sections = ("exec", "log", "eval", "checkpoint")
    free = ("train.steps", "train.patience", "data.dir", "data.cache_dir", "data.workers") + tuple(
        k for k in KEYS if k.split(".")[0] in sections
    )
    value = KEYS[key]
    other = {
        bool: lambda: not value,
        int: lambda: value + 3,
        float: lambda: value / 2 + 0.01,
        str: lambda: value + "x",
        tuple: lambda: (*value, 3),
    }[type(value)]()
    old, new = changed(key, value), changed(key, other)
    expected = [] if key in free else [f"{key}: {value!r} -> {other!r}"]
    assert differences(old, new) == expected


def test_a_config_is_read_and_checked_without_jax(tmp_path):
    code = f"""
import sys
import jdm.config
jdm.config.load_config({NAME!r}, ["--config.optim.lr=3e-4"])
try:
    jdm.config.load_config({NAME!r}, ["--config.optim.lrr=3e-4"])
except ValueError as error:
    print(error)
print(sorted({{"jax", "flax", "optax"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60
    )
    assert done.returncode == 0, done.stderr
    sentence, modules = done.stdout.strip().splitlines()
    assert sentence == "config.optim.lrr is unknown; did you mean optim.lr?"
    assert modules == "[]"
