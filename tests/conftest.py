"""What the whole suite shares: where it caches, the data, and a few trained models."""

import ast
import fcntl
import gc
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
# What the published implementation computed, stored; see the README there.
SHARED = Path(os.environ.get("JDM_SHARED", ROOT.parent / "shared"))
FIXTURES = SHARED / "fixtures"
CACHE = ROOT / ".cache"
JDM = Path(sys.executable).with_name("jdm")

# Before JAX is imported, and for the subprocesses of the tests too: compiled programs are kept
# between runs, and data is prepared beside the checkout, not in the user's home.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["TFDS_DATA_DIR"] = str(CACHE / "tfds")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# As jdm.startup.keep_memory, for the workers, which start after this, and for their subprocesses.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**36))
os.environ.setdefault("MALLOC_ARENA_MAX", "1")

# Tiny models run for milliseconds and compile for seconds: without optimisation, in a quarter of
# the time. Trained models run in processes of their own, at the level that runs as fast as any and
# compiles faster. Both with XLA's older code generator for fused operations, which compiles faster,
# and in one piece, since the other core has work of its own.
TINY, TRAINED = "--xla_backend_optimization_level=0", "--xla_backend_optimization_level=1"
COMPILER = "--xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no such choice
    COMPILER += " --xla_cpu_use_fusion_emitters=false"
TINY, TRAINED = f"{TINY} {COMPILER}", f"{TRAINED} {COMPILER}"
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "").replace(TINY, "").strip()  # a worker has TINY already
os.environ["XLA_FLAGS"] = f"{GIVEN_FLAGS} {TINY}".strip()

# The files that take longest, in that order: they are started first, so that both workers end at
# the same time, and `make check` leaves them out.
SLOW = """
test_notebooks test_preemption test_fsdp test_parity test_digits_models test_page
test_eval_processes test_trained test_cli test_bucket test_launch test_sample test_distributed
test_runs test_trainer test_step test_numerics test_explain test_hub test_trainer_best test_bfloat16
test_extending test_generation test_editing test_pretrained test_profiling test_convert
test_samplers test_config test_model test_joint test_augment test_sampler_order
test_guided_diffusion test_version_0 test_splits test_pipeline test_unet test_workdir
test_checkpoint_failures test_class_names test_request test_probe test_metrics test_evaluators
test_reverse_step test_guidance test_heads test_report test_paths test_messages test_environment
test_mnist5k test_stepwise test_notebook test_tpu
""".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


def pytest_collection_finish():
    """What was imported stays. Collecting garbage among it takes a third of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _source_hash() -> str:
    """Of the code that a trained model depends on, without its comments and docstrings."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("jdm/**/*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                ast.get_docstring(node, clean=False) is not None
            ):
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def optimised() -> dict[str, str]:
    """The environment of a process whose programs are compiled for speed."""
    return {**os.environ, "XLA_FLAGS": f"{GIVEN_FLAGS} {TRAINED}".strip()}


@pytest.fixture(scope="session")
def trained(optimised):
    """(config name, *overrides) -> the path of a work folder trained with it; cached on disk."""
    source = _source_hash()

    def get(name: str, *overrides: str) -> Path:
        key = hashlib.sha256(json.dumps([name, overrides]).encode()).hexdigest()[:16]
        workdir = CACHE / "models" / source / key
        if workdir.exists():
            return workdir
        for old in (CACHE / "models").glob("*"):
            if old.name != source:
                shutil.rmtree(old, ignore_errors=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with open(workdir.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be training it
            if not workdir.exists():
                making = workdir.with_name(f"{key}.{os.getpid()}")
                if name == "tiny":  # in this process, which then has its programs
                    from jdm import config, trainer

                    trainer.train(config.load_config(name, overrides), making)
                else:
                    command = [JDM, "train", f"--config={name}", f"--workdir={making}", *overrides]
                    subprocess.run(command, check=True, env=optimised)
                making.rename(workdir)
        return workdir

    return get


@pytest.fixture(scope="session")
def tiny(trained) -> Path:
    """The work folder of a `tiny` run of 4 steps."""
    return trained("tiny")


@pytest.fixture
def run(capfd, monkeypatch):
    """run(*argv, cwd=None): the command jdm in this process, with its output and exit status."""
    from jdm.cli import main

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main replaces it

    def call(*argv, cwd=None) -> subprocess.CompletedProcess:
        capfd.readouterr()
        if cwd is not None:
            monkeypatch.chdir(cwd)
        try:
            main(list(map(str, argv)))
            status = 0
        except SystemExit as ending:
            status = ending.code or 0
        return subprocess.CompletedProcess(argv, status, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def free_port():
    """free_port(): the number of a port that no process listens at."""

    def find() -> int:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return free.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def two_processes(free_port):
    """two_processes(script, *arguments): how two processes end that run a script, each with two
    devices. Their first arguments are the address of process 0, and the number of the process."""

    def call(script: str, *arguments) -> list[subprocess.CompletedProcess]:
        address = f"127.0.0.1:{free_port()}"
        devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        options["env"] = {**os.environ, "XLA_FLAGS": devices}
        rarely = "from jdm import startup\nstartup.collect_rarely()\n"
        command = [sys.executable, "-c", rarely + script, address]
        started = [
            subprocess.Popen([*command, str(index), *map(str, arguments)], **options)
            for index in range(2)
        ]
        output = [process.communicate(timeout=300) for process in started]
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *said)
            for process, said in zip(started, output, strict=True)
        ]

    return call


@pytest.fixture(scope="session")
def assert_same_images():
    """The same, as far as floats summed in another order are: one level on 0.1 % of pixels."""

    def check(a, b):
        difference = np.abs(a.astype(int) - b.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.001

    return check


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The tar of CIFAR-10's training images, train/<class>/<number>.jpg; it may be missing."""
    return SHARED / "data" / "cifar10-train-jpeg.tar"


@pytest.fixture(scope="session")
def published():
    """published(name) -> a stored run of the published implementation: its config, the file of its
    weights, and its arrays, images and feature maps as [B, H, W, C]."""
    if not FIXTURES.is_dir():
        pytest.skip(f"{FIXTURES} is not there; JDM_SHARED says where else it may be")
    pytest.importorskip("torch", reason="PyTorch (the extra torch) reads the published weights")

    def get(name: str) -> SimpleNamespace:
        with np.load(FIXTURES / f"{name}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        for key, x in arrays.items():
            if x.ndim >= 4 and not key.startswith("grad/"):
                arrays[key] = np.moveaxis(x, -3, -1)
        flags = json.loads((FIXTURES / f"{name}.json").read_text())
        return SimpleNamespace(
            config=config_of(flags), file=FIXTURES / f"{name}.pt", arrays=arrays, flags=flags
        )

    return get


def config_of(flags: dict):
    """Our config for the published implementation's flags."""
    from jdm.config import check_config, load_config

    config = load_config("reference/cifar10")
    size = flags["image_size"]
    factors = [size // int(side) for side in flags["attention_resolutions"].split(",")]
    levels = {28: (1, 2, 2), 32: (1, 2, 2, 2), 64: (1, 2, 3, 4)}[size]
    learned = flags["learn_sigma"]
    config.model.update(
        image_size=size,
        image_channels=flags["in_channels"],
        num_classes=flags["num_classes"],
        channels=flags["num_channels"],
        multipliers=levels,
        blocks=flags["num_res_blocks"],
        attention=tuple(size // 2**i for i in range(len(levels)) if 2**i in factors),
        heads=flags["num_heads"],
        learned_variance=learned,
        resample="resblock" if flags["resblock_updown"] else "conv",
        attention_order="qkv_first" if flags["use_new_attention_order"] else "head_first",
    )
    config.diffusion.update(
        steps=flags["diffusion_steps"],
        schedule=flags["noise_schedule"],
        prediction="x0" if flags["predict_xstart"] else "eps",
        variance="learned" if learned else "fixed_large",
    )
    check_config(config)
    return config
