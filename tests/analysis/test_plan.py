"""Plans for TPU slices: what is counted, what follows from it, and what the command refuses."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm import cli
from jdm.analysis import hlo, plan
from jdm.analysis.hlo import Buffer, collectives, largest_buffers, products
from jdm.analysis.plan import Step
from jdm.analysis.plan_options import CHIPS
from jdm.config import load_config
from jdm.errors import InvalidValue
from jdm.mesh import by_row, make_mesh
from jdm.nn.attention import ATTENTIONS
from jdm.target import compiling_for, platform

TEXT = """
HloModule jit_step, num_partitions=4

%fused (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(f32[8]{0} %p), replica_groups={}
}

%beside (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(f32[8]{0} %p), channel_id=12, replica_groups={}
}

%beside.1 (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(f32[8]{0} %p), channel_id=12, replica_groups={}
}

ENTRY %main (a: f32[8,8]) -> f32[4] {
  %a = f32[8,8]{1,0} parameter(0)
  %big = bf16[64,8]{1,0:T(8,128)} fusion(%a), kind=kLoop, metadata={op_name="jit(step)/conv"}
  %near = f32[4096]{0:T(128)S(1)} fusion(%a), kind=kLoop
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %two = (f32[3]{0}, /*index=1*/pred[6]{0}) all-reduce-start(%a, %a)
  ROOT %out = f32[4]{0} add(%a, %a)
}
"""


def counted(function, *inputs):
    return products(jax.make_jaxpr(function)(*inputs).jaxpr)


def test_products_of_matrices_in_loops_too():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert counted(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert counted(jax.jit(jnp.matmul), a, b) == 2 * 3 * 4 * 5

    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c @ b @ b.T, None), a, length=7)[0]

    assert counted(loop, a, b) == 7 * 2 * (2 * 3 * 4 * 5)


def test_products_of_a_kernel_are_those_of_each_image_on_every_device():
    def attend(implementation):
        return lambda x: ATTENTIONS[implementation].attend(x, 4, "head_first")

    qkv = jax.device_put(np.ones((3, 64, 3 * 32), np.float32), by_row(make_mesh()))
    with compiling_for("tpu"):
        plain, kernel = (counted(attend(name), qkv) for name in ("xla", "fused"))
        gradient = counted(jax.grad(lambda x: attend("fused")(x).sum()), qkv)
    assert kernel == plain == 2 * 2 * 3 * 64 * 64 * 32
    assert gradient == 3.5 * plain  # the scores once more than without the kernel


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_its_images_alone_and_its_two_derivatives_as_much(stride):
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def conv(x, kernel):
        where = dict(padding=[(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), **where)

    along = 3 * 8 - 2 if stride == 1 else 3 * 4 - 1  # places of a window inside the image
    assert counted(conv, x, kernel) == 2 * 2 * 3 * 5 * along**2
    both = jax.grad(lambda x, kernel: (conv(x, kernel) ** 2).sum(), argnums=(0, 1))
    assert counted(both, x, kernel) == 3 * 2 * 2 * 3 * 5 * along**2


def test_the_text_of_a_program_is_read():
    assert hlo.size_of("(f32[2,3]{1,0}, bf16[4], s32[], pred[5])") == 24 + 8 + 4 + 5
    assert hlo.size_of("(f8e4m3fn[3], u4[2], token[], opaque[])") == 3 + 1
    assert collectives(TEXT) == {"all-reduce": 32 + 32 + 12 + 6, "all-gather": 32}
    first, *others = largest_buffers(TEXT)
    assert first == Buffer(1024, "bf16[64,8]", "jit(step)/conv")
    assert max(one.bytes for one in others) == 32  # S(1) is not in the chip's memory


def test_what_follows_from_the_counts(monkeypatch):
    monkeypatch.setattr(plan, "devices_of", lambda _: [None] * 4)
    config = load_config("tiny", ["--config.train.steps=3600"])
    step = Step(8, products=197e9, traffic=819e7, collectives={"all-reduce": 10**6}, memory=2**30)
    found = plan.figures(step, "v5e:2x2", config)
    bounds = {"compute": 1e-3, "memory": 1e-2, "network": 1e-5}
    assert found["bounds_seconds"] == pytest.approx(bounds)
    assert found["bound_by"] == "memory" and found["fits"]
    assert found["images_a_second_at_most"] == pytest.approx(3200)
    assert found["mfu_at_most"] == pytest.approx(0.1)
    assert found["hours_at_least"] == pytest.approx(0.01)
    large = plan.figures(Step(8, error="Used 20G of 16G"), "v5e:2x2", config)
    cells = plan.rows_of("training step", {"v5e:2x2": {"training step": large}})
    assert ["memory of a chip", "does not fit"] in cells
    assert ["ms a step, at least", ""] in cells  # no speed of what does not fit
    too = plan.figures(Step(8, memory=17 * 2**30), "v5e:2x2", config)
    assert not too["fits"]


def test_a_program_that_jax_cannot_read_is_counted_without_its_collectives(monkeypatch, capsys):
    monkeypatch.setattr(plan, "devices_of", lambda _: [None] * 16)

    def unreadable(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n*** a trace ***")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    lowered = jax.jit(jnp.dot).lower(jnp.ones((4, 4)), jnp.ones((4, 4)))
    step = plan._compiled(lowered, "step", rows=8, count=2e9)
    assert step.traffic > 0 and step.collectives is None
    assert "cannot read the compiled program" in (said := capsys.readouterr().err)
    assert "INTERNAL: RET_CHECK failure" in said and "a trace" not in said
    found = plan.figures(step, "v6e:4x4", load_config("tiny"))
    cells = plan.rows_of("training step", {"v6e:4x4": {"training step": found}})
    assert ["MB through collectives", "not known"] in cells


def test_the_platform_is_that_of_the_program():
    assert platform() == "cpu"
    with compiling_for("tpu"):
        assert platform() == "tpu"
        x, kernel = jnp.ones((1, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
        from jdm.nn.convolution import conv

        assert "conv_general_dilated" in str(jax.make_jaxpr(lambda *a: conv(*a))(x, kernel))
    assert platform() == "cpu"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v9:2x2"], "--topology='v9:2x2' must be different slices of v5e, v5p, v6e"),
        (["--topology=v5e"], "--topology='v5e' must be"),
        (["--topology=v5e:2x2,v5e:2x2"], "--topology='v5e:2x2' must be different"),
        (["--topology=v5e:2x2", "--per_chip=0"], "--per_chip=0 must be positive"),
        (["--topology=v5e:2x2", "--out=a.txt"], "--out='a.txt' must end in .json"),
        (["--topology=v5e:2x2", "--config.optim.lr=0"], "config.optim.lr=0"),
    ],
)
def test_bad_flags(run, flags, said):
    done = run("plan", "--config=tiny", *flags)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_slices_are_listed(run):
    done = run("plan", "--topology=list")
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(CHIPS)
    assert "v5e:4x4" in done.stdout


def test_every_slice_is_checked_before_one_is_compiled(monkeypatch):
    def devices(topology):
        if topology == "v5e:3x3":
            raise InvalidValue("topology", topology, "is refused")
        return jax.devices()

    monkeypatch.setattr(plan, "devices_of", devices)
    monkeypatch.setattr(plan, "_plan", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(InvalidValue, match="v5e:3x3"):
        plan.plans(load_config("tiny"), ["v5e:1x1", "v5e:3x3"])
    accumulating = load_config("tiny", ["--config.exec.accumulate=2"])
    with pytest.raises(InvalidValue, match="=5 does not divide by config.exec.accumulate=2"):
        plan.plans(accumulating, ["v5e:1x1"], per_chip=5)


def test_without_libtpu(run, monkeypatch):
    monkeypatch.setattr(cli.plan, "NO_CHIPS", {})
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = importlib.util.find_spec
    without = lambda name, *more: None if name == "libtpu" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    done = run("plan", "--config=tiny", "--topology=v5e:2x2")
    assert done.returncode == 1
    assert done.stderr.endswith("needs libtpu: pip install 'jdm[plan]'\n")


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra plan")
def test_a_plan_of_a_small_config(tmp_path):
    """Also that of a slice that libtpu does not know, and of a batch that does not divide."""

    def planned(*flags):
        command = [sys.executable, "-m", "jdm", "plan", "--config=tiny", *flags]
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        env.pop("XLA_FLAGS", None)
        return subprocess.run(command, env=env, capture_output=True, text=True)

    out = tmp_path / "plan.json"
    done = planned("--topology=v5e:2x2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    step = json.loads(out.read_text())["v5e:2x2"]["training step"]
    assert step["fits"] and step["images"] == load_config("tiny").data.batch_size
    assert np.isclose(step["tflop_a_chip"], step["products_tflop_a_chip"], rtol=0.5)
    assert step["collectives_mb"]["all-reduce"] > 0
    assert planned("--topology=v5e:2x2", f"--out={out}").stderr == ""  # it was kept
    assert "refused by libtpu" in planned("--topology=v5e:3x3").stderr
    assert (
        "does not divide by the 16 devices"
        in planned("--topology=v5e:4x4", "--config.data.batch_size=8").stderr
    )
