"""What a training step and a guided sampling step would need on TPU chips that are not here.

The programs are those of jdm.trainer and jdm.sample, compiled by libtpu for a slice of chips, which
are described and need not exist (the topologies of jax.experimental). XLA's counts give what bounds
a step: the operations over the chip's rate, or the bytes over its bandwidth. Such times are lower
bounds, not measurements.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jdm
from jdm.analysis.hlo import collectives, largest_buffers, products
from jdm.analysis.plan_options import CHIPS, Chip
from jdm.config import check_config, config_to_dict
from jdm.diffusion.guidance import chosen
from jdm.diffusion.method import Method
from jdm.errors import Failure, InvalidValue
from jdm.files import read_json, write_whole
from jdm.mesh import by_row, make_mesh, replicated
from jdm.messages import say
from jdm.numerics import fixed_flags, key_of
from jdm.sampling.programs import trace_sampler
from jdm.sampling.request import Recipe
from jdm.startup import cache_folder
from jdm.target import compiling_for
from jdm.training.build import abstract_batch, build, check_batch_of

SAID_EVERY = 30  # seconds between lines while a program is compiled


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on each chip, as XLA counts it.

    flops: all operations; products: those of matrix products and convolutions, counted in the
    traced program. traffic: bytes to and from the chip's memory. memory: bytes that the program
    holds there; collectives: {kind: bytes}, None where JAX cannot read what libtpu has compiled.
    estimate: XLA's own seconds, where it has any. error: the compiler's sentence where the program
    does not fit; all others are 0 then.
    """

    rows: int
    flops: float = 0
    products: float = 0
    traffic: float = 0
    memory: int = 0
    collectives: dict[str, int] | None = dataclasses.field(default_factory=dict)
    buffers: tuple = ()
    estimate: float | None = None
    compiled_in: float = 0
    error: str = ""

    def seconds(self, chip: Chip) -> dict[str, float]:
        """{what bounds a step: the seconds it takes at least}."""
        return {
            "compute": self.products / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "network": sum(_sent(*one) for one in (self.collectives or {}).items()) / chip.network,
        }


def _sent(kind: str, size: int) -> int:
    """Bytes that a chip sends in a collective whose result has this size, among many chips."""
    return 2 * size if kind == "all-reduce" else size


def plans(
    config: ConfigDict, topologies: Sequence[str], per_chip: int | None = None
) -> dict[str, dict[str, Step]]:
    """{topology: {"training step": …, "sampling step, pixel guidance": …}} for slices such as
    "v5e:4x4"; the second only of a config that trains both the diffusion model and the classifier.

    per_chip: images of each chip in a step; None is config.data.batch_size over the chips. Results
    are kept in the user's cache, for the same config, slice, code and versions.

    Raises InvalidValue for a slice that libtpu does not know, and a batch that does not divide,
    before anything is compiled; Failure where libtpu is missing.
    """
    on = {name: _on(config, name, per_chip) for name in topologies}
    return {name: _plan(name, *each) for name, each in on.items()}


def _on(config: ConfigDict, topology: str, per_chip: int | None) -> tuple[ConfigDict, Mesh]:
    """(the config with the batch of this slice, its mesh)."""
    mesh = make_mesh(devices_of(topology))
    config = ConfigDict(config.to_dict())
    if per_chip is not None:
        config.data.batch_size = per_chip * mesh.size
        check_config(config)
    check_batch_of(config, mesh)
    return config, mesh


@fixed_flags()
def _plan(topology: str, config: ConfigDict, mesh: Mesh) -> dict[str, Step]:
    """The steps of a config on a slice."""
    kept = _kept(config, topology)
    if kept is not None and kept.exists():
        return {name: Step(**step) for name, step in read_json(kept).items()}
    rows = config.data.batch_size // mesh.size
    with compiling_for("tpu"):
        steps = {
            name: _compiled(program, f"{name} for {topology}", rows, count)
            for name, program, count in list(_lowered(config, mesh))
        }
    if kept is not None:
        write_whole(kept, json.dumps({k: dataclasses.asdict(s) for k, s in steps.items()}))
    return steps


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice. Raises InvalidValue and Failure, see `plans`."""
    if importlib.util.find_spec("libtpu") is None:
        raise Failure("compiling for a TPU needs libtpu: pip install 'jdm[plan]'")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError) as error:  # which one depends on what is wrong
        said = re.sub(r"^[A-Z_]+: ", "", str(error).splitlines()[0])
        hint = "--topology=list shows common ones"
        raise InvalidValue("topology", topology, f"is refused by libtpu: {said}", hint) from None


def _lowered(config: ConfigDict, mesh: Mesh) -> Iterator[tuple[str, Any, float]]:
    """(name, lowered program, operations of its products on a chip)."""
    whole, key = replicated(mesh), key_of(0)
    run = build(config, mesh)
    root = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    traced = run.step.trace(run.state, abstract_batch(config, by_row(mesh)), root)
    yield "training step", traced.lower(), products(traced.jaxpr.jaxpr) / mesh.size
    terms = config.loss.terms
    if "diffusion" in terms and "classifier" in terms:
        method = chosen(dataclasses.replace(Method(), steps=1), labelled=True)
        rows = config.data.batch_size
        traced = trace_sampler(run.model, None, run.diffusion, Recipe(method), mesh, rows)
        count = products(traced.jaxpr.jaxpr) / mesh.size
        yield f"sampling step, {method.guidance} guidance", traced.lower(), count


def _compiled(lowered: Any, name: str, rows: int, count: float) -> Step:
    """The counts of a compiled program. count: of its products."""
    started = time.monotonic()
    try:
        with _saying(f"compiling the {name}"):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.sub(r"^RESOURCE_EXHAUSTED: ", "", str(error).splitlines()[0])
        return Step(rows, products=count, error=said)
    costs, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), _text_of(compiled)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    held += memory.generated_code_size_in_bytes - memory.alias_size_in_bytes
    estimate = costs.get("optimal_seconds", 0)
    return Step(
        rows,
        flops=costs["flops"],
        products=count,
        traffic=costs["bytes accessed"],
        memory=held,
        collectives=None if text is None else collectives(text),
        buffers=() if text is None else tuple(largest_buffers(text)),
        estimate=estimate if estimate > 0 else None,
        compiled_in=time.monotonic() - started,
    )


def _text_of(compiled: jax.stages.Compiled) -> str | None:
    """The text of a program; None where it has operations that jaxlib does not know: libtpu is
    newer than it, and has another version of XLA."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        say(f"JAX cannot read the compiled program, for its collectives and largest arrays: {said}")
        return None


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Says what is done, and every SAID_EVERY seconds for how long."""
    ended, started = threading.Event(), time.monotonic()

    def follow() -> None:
        while not ended.wait(SAID_EVERY):
            say(f"{what}: {time.monotonic() - started:.0f} s")

    say(f"{what}, which takes minutes for a large network")
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _kept(config: ConfigDict, topology: str) -> Path | None:
    """The file of a plan: its name depends on all that the programs do. None where there is no
    folder for it."""
    source = hashlib.sha256()
    for path in sorted(Path(jdm.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    versions = [version(name) for name in ("jax", "jaxlib", "libtpu")]
    what = [config_to_dict(config), topology, *versions, source.hexdigest()]
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    try:
        return cache_folder("plan") / f"{name}.json"
    except OSError:
        return None


def report(config: ConfigDict, found: dict[str, dict[str, Step]]) -> dict[str, Any]:
    """{topology: {step: figures}}, ready for JSON."""
    return {
        topology: {name: figures(step, topology, config) for name, step in steps.items()}
        for topology, steps in found.items()
    }


def figures(step: Step, topology: str, config: ConfigDict) -> dict[str, Any]:
    """What follows from the counts of a step on the chips of a slice; see docs/plan.md."""
    chip, chips = CHIPS[topology.partition(":")[0]], len(devices_of(topology))
    bounds = step.seconds(chip)
    least = max(bounds.values())
    images = step.rows * chips
    shown: dict[str, Any] = {
        "chips": chips,
        "images": images,
        "fits": not step.error and step.memory <= chip.memory,
        "memory_gib": step.memory / 2**30,
        "memory_of_the_chip_gib": chip.memory / 2**30,
        "tflop_a_chip": step.flops / 1e12,
        "products_tflop_a_chip": step.products / 1e12,
        "gflop_an_image": step.products / step.rows / 1e9,
        "traffic_gb_a_chip": step.traffic / 1e9,
        "collectives_mb": step.collectives
        and {kind: size / 1e6 for kind, size in step.collectives.items()},
        "bounds_seconds": bounds,
        "xla_seconds": step.estimate,
        "compiled_in_seconds": step.compiled_in,
        "largest_buffers": [list(buffer) for buffer in step.buffers],
        "error": step.error,
    }
    if least and not step.error:
        shown |= {
            "bound_by": max(bounds, key=bounds.__getitem__),
            "ms_at_least": 1e3 * least,
            "images_a_second_at_most": images / least,
            "mfu_at_most": bounds["compute"] / least,
            "hours_at_least": config.train.steps * least / 3600,
        }
    return shown


def rows_of(name: str, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The figures of one step on several slices, as cells: a row for each figure."""
    of = {topology: steps[name] for topology, steps in found.items() if name in steps}

    def row(head: str, text: Any) -> list[str]:
        return [head, *(text(one) for one in of.values())]

    def where(key: str, form: str) -> Any:
        return lambda one: form.format(one[key]) if key in one else ""

    def memory(one: dict) -> str:
        if one["error"]:
            return "does not fit"
        held = f"{one['memory_gib']:.3g} of {one['memory_of_the_chip_gib']:.0f} GiB"
        return held if one["fits"] else f"does not fit: {held}"

    def sent(one: dict) -> str:
        if one["collectives_mb"] is None:
            return "not known"
        kinds = [f"{kind} {size:.3g}" for kind, size in one["collectives_mb"].items()]
        return ", ".join(kinds) or "none"

    rows = [
        ["", *of],
        row("chips", lambda one: f"{one['chips']}"),
        row("images of a step", lambda one: f"{one['images']:,}"),
        row("memory of a chip", memory),
        row("GFLOP of products an image", where("gflop_an_image", "{:.3g}")),
        row("TFLOP of products a chip", where("products_tflop_a_chip", "{:.3g}")),
        row("TFLOP a chip as XLA counts", where("tflop_a_chip", "{:.3g}")),
        row("GB of memory traffic a chip", where("traffic_gb_a_chip", "{:.3g}")),
        row("MB through collectives", sent),
        row("bound by", where("bound_by", "{}")),
        row("ms a step, at least", where("ms_at_least", "{:.3g}")),
        row("images a second, at most", where("images_a_second_at_most", "{:,.0f}")),
        row("MFU, at most", where("mfu_at_most", "{:.0%}")),
    ]
    if name == "training step":
        rows.append(row("hours of training, at least", where("hours_at_least", "{:.3g}")))
    return rows
