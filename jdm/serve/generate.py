"""The tab Generate: images by class and seed, shown while they are made."""

import html
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from jdm.diffusion.method import OPTIONS
from jdm.joint import Joint
from jdm.names import SAMPLERS
from jdm.sampling.labels import label_text, parse_numbers
from jdm.sampling.samples import Samples
from jdm.sampling.stepwise import sample_stepwise
from jdm.serve import choices, show
from jdm.serve.jobs import MODEL, connect, guarded
from jdm.serve.options import ServeOptions

EMPTY = "The images are shown here while they are made."
FIRST = "Preparing. What is sampled in a new way is compiled once, which can take a minute."
FORMATS = {"png": "image/png", "gif": "image/gif", "npz": "application/octet-stream"}
DOES = {"png": "Download the images", "gif": "as they emerged (GIF)", "npz": "as arrays (NPZ)"}


def make(joint: Joint, options: ServeOptions) -> Callable[..., Iterator[tuple[str, str, str]]]:
    """The handler: (class, attributes that are off, seeds, guidance, scale, sampler, steps) ->
    yields (status, images, downloads), each HTML."""

    @guarded(outputs=3)
    def generate(
        choice: Any, without: Any, seeds: str, guidance: str, scale: float, sampler: str, steps: int
    ) -> Iterator[tuple[str, str, str]]:
        numbers = parse_numbers("seeds", seeds.replace(" ", ""), options.images)
        labels = (
            choices.labels(joint, choice, without, len(numbers)) if guidance != "none" else None
        )
        given: dict[str, Any] = dict(
            sampler=sampler, steps=int(steps), guidance=guidance if labels is not None else "none"
        )
        if labels is not None:
            given["scale"] = float(scale)
        steps_now = sample_stepwise(joint, labels=labels, seeds=numbers, **given)
        yield show.status(FIRST, busy=True), "", ""
        began, count = time.monotonic(), 1
        samples = _next(steps_now)
        while samples.trajectory is None:  # the last ones have it
            said = f"Step {count} of {given['steps']}"
            yield show.status(said, busy=True), _grid(samples), ""
            samples, count = _next(steps_now), count + 1
        took = f"{len(numbers)} images in {time.monotonic() - began:.1f} s"
        said = f"{took}. {_about(samples)}"
        yield show.status(said), _grid(samples), _downloads(samples) + _code(numbers, labels, given)

    return generate


def _next(samples: Iterator[Samples]) -> Samples:
    with MODEL:
        return next(samples)


def _about(samples: Samples) -> str:
    if samples.labels is None:
        return "Not guided by a class."
    return "The percentage is the probability that the model's own classifier gives the class."


def _grid(samples: Samples) -> str:
    captions = []
    for i, seed in enumerate(samples.seeds):
        label = "" if samples.labels is None else label_text(samples.labels[i], samples.class_names)
        p = samples.probabilities
        sure = "" if p is None or p[i] != p[i] else f" {p[i]:.0%}"
        captions.append(f"{label}{sure} (seed {seed})".strip())
    return show.grid(samples.images, captions)


def _downloads(samples: Samples) -> str:
    links = []
    with tempfile.TemporaryDirectory(prefix="jdm-serve-") as folder:
        for ending, kind in FORMATS.items():
            path = Path(folder) / f"samples.{ending}"
            samples.save(path)
            links.append(show.download(path.read_bytes(), kind, path.name, DOES[ending]))
    return f'<p class="jdm-downloads">{" ".join(links)}</p>'


def _code(numbers: list[int], labels: Any, given: dict) -> str:
    """The call that makes these images."""
    shown = dict(seeds=numbers) | given
    if labels is not None:
        shown = {
            "labels": [*map(int, labels)] if isinstance(labels, list) else labels.tolist(),
            **shown,
        }
    arguments = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    code = html.escape(f"jdm.sample(joint, {arguments})")
    return f"<details><summary>In Python</summary><pre>{code}</pre></details>"


def tab(joint: Joint, options: ServeOptions) -> None:
    """Adds the contents of the tab."""
    guided = choices.default_guidance(joint)
    sampler, steps, scale = choices.defaults(joint, guided)
    names = choices.class_names(joint)
    without: gr.components.Component
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            if joint.model.multi_label:
                rows = [(name, k) for k, name in enumerate(names)]
                choice = gr.Dropdown(rows, label="With", multiselect=True, value=[0])
                without = gr.Dropdown(rows, label="Without", multiselect=True, value=[])
            else:
                start = choices.EVERY if joint.has_classifier else choices.NO_CLASS
                rows = (
                    choices.classes(joint) if joint.has_classifier else choices.classes(joint)[-1:]
                )
                choice = gr.Dropdown(rows, label="Class", value=start, elem_id="class")
                without = gr.State([])
            with gr.Row(equal_height=False):
                text = f"one for each image, up to {options.images}: 0-3, or 1,5"
                seeds = gr.Textbox(
                    "0-3", label="Seeds", info=text, min_width=160, scale=3, elem_id="seeds"
                )
                other = gr.Button(
                    "Other seeds", scale=1, min_width=100, size="sm", elem_id="other-seeds"
                )
            with gr.Accordion("Sampler, steps and guidance", open=False):
                guidance = gr.Dropdown(
                    choices.guidances(joint),
                    value=guided,
                    label="Guidance",
                    info=OPTIONS["guidance"].help,
                )
                strength = gr.Slider(
                    0, 4 * scale or 1, scale, label="Scale", info=OPTIONS["scale"].help
                )
                algorithm = gr.Dropdown(
                    list(SAMPLERS), value=sampler, label="Sampler", info=OPTIONS["sampler"].help
                )
                most = choices.most_steps(joint)
                count = gr.Slider(
                    1, most, steps, step=1, label="Steps", info="denoising steps", elem_id="steps"
                )
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", elem_id="generate-stop", min_width=80)
        with gr.Column(scale=2, min_width=280):
            status, images, files = (
                show.html_of(EMPTY),
                show.html_of(elem_id="images"),
                show.html_of(),
            )

    def defaults(name: str) -> tuple[str, int, gr.Slider]:
        sampler, steps, scale = choices.defaults(joint, name)
        return sampler, steps, gr.Slider(maximum=4 * scale or 1, value=scale)

    def seeds_again(text: str) -> str:
        n = len(parse_numbers("seeds", text.replace(" ", ""), options.images))
        first = secrets.randbelow(2**31)
        return f"{first}-{first + n - 1}"

    quick: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")
    guidance.change(defaults, guidance, [algorithm, count, strength], **quick)
    other.click(lambda text: _or(seeds_again, text), seeds, seeds, **quick)
    inputs = [choice, without, seeds, guidance, strength, algorithm, count]
    started_by = [go.click, seeds.submit]
    connect(started_by, stop, make(joint, options), inputs, [status, images, files], "generate")


def _or(function: Callable[[str], str], text: str) -> str:
    """The result, or the text itself where it is not a list of seeds."""
    try:
        return function(text)
    except ValueError:
        return text
