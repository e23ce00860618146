"""The tab Explain: what would have to change in a picture for another class."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

import jdm
from jdm.analysis.explain.explanations import Explanations
from jdm.analysis.explain.figure import change_map
from jdm.analysis.explain_options import OPTIONS
from jdm.joint import Joint
from jdm.sampling.labels import label_text, parse_numbers
from jdm.serve import choices, pad, show, uploads
from jdm.serve.jobs import connect, followed, guarded
from jdm.serve.options import ServeOptions

EMPTY = "Choose a picture and a target. Mark a region with the brush, and only that may change."
FIRST = "Preparing. The first explanation compiles its programs, which can take minutes."
MOST_DRAWS = 12


def make(joint: Joint, options: ServeOptions) -> Callable[..., Iterator[tuple[str, Any]]]:
    """The handler: (the value of a pad, target, attributes that are off, seed, draws, confidence)
    -> yields (status, the pictures), each HTML."""

    @guarded(outputs=2)
    def handler(
        value: str | None, choice: Any, without: Any, seed: str, draws: int, confidence: float
    ) -> Iterator[tuple[str, Any]]:
        sent = pad.content_of(value)
        if not sent["picture"]:
            yield show.status(EMPTY), ""
            return
        target = choices.target(joint, choice, without)
        pixels = uploads.pixels_of(sent["picture"], joint.image_shape, options)
        region = uploads.region_of(sent["region"], joint.image_shape, options)
        job = functools.partial(
            jdm.explain,
            joint,
            pixels[None],
            target,
            seeds=parse_numbers("seed", seed.strip(), 1),
            region=region,
            draws=int(draws),
            confidence=float(confidence),
        )
        yield show.status(FIRST, busy=True), ""
        for found in followed(job):
            if isinstance(found, tuple):
                said = f"Searching: strength {found[0]} of at most {found[1]}"
                yield show.status(said, busy=True), gr.skip()
            elif found is not None:
                yield show.status(_said(found)), _pictures(found)

    return handler


def _name(found: Explanations) -> str:
    return label_text(found.targets[0], found.class_names)


def _said(found: Explanations) -> str:
    row = found.records()[0]
    if not row["found"]:
        return f"No counterfactual to {_name(found)}: {row['reason']}."
    far = row.get("novelty")
    return " ".join(
        [
            f"Probability of {_name(found)}: {row['target_before']:.1%} before,",
            f"{row['target_after']:.1%} after; {row['target_control']:.1%} by the same noise",
            "without guidance.",
            f"{row['changed']:.0%} of the pixels changed, at strength {row['strength']:g}.",
            f"It {'holds' if row['still'] else 'does not hold'} after new noise.",
            "" if far is None else f"Distance to the training images: percentile {far:.0f}.",
        ]
    ).strip()


def _pictures(found: Explanations) -> str:
    if not found.valid[0]:
        return show.figure(found.before[0], "before", "before")
    strengths, before = [0.0, *found.settings["strengths"]], found.before[0]
    reached = strengths.index(found.found.strength[0])
    frames = []
    for frame, strength in enumerate(strengths[: reached + 1]):
        after = found.after[0] if frame == reached else found.found.film[frame, 0]
        what = "after" if frame == reached else "on the way" if frame else "unchanged"
        caption = f"{what}, strength {strength:g}"
        changes = show.figure(
            change_map(before, after),
            "added in red, removed in blue",
            "added in red, removed in blue",
        )
        frames.append(f'<div class="jdm-row">{show.figure(after, what, caption)}{changes}</div>')
    return show.film(show.figure(before, "before", "before"), frames, "Strength", reached)


def tab(joint: Joint, options: ServeOptions, examples: dict) -> None:
    """Adds the contents of the tab. examples: of the pad."""
    names = choices.class_names(joint)
    rows = [(name, k) for k, name in enumerate(names)]
    target: gr.components.Component
    without: gr.components.Component
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = pad.make(options=options, region=True, elem_id="explain-pad", **examples)
            if joint.model.multi_label:
                target = gr.Dropdown(rows, label="Target: with", multiselect=True, value=[0])
                without = gr.Dropdown(rows, label="Target: without", multiselect=True, value=[])
            else:
                target = gr.Dropdown(rows, label="Target", value=0, elem_id="target")
                without = gr.State([])
            with gr.Accordion("How it is searched", open=False):
                seed = gr.Textbox(
                    "0", label="Seed", info="of the noise; another gives another result"
                )
                draws, sure = OPTIONS["draws"], OPTIONS["confidence"]
                tried = gr.Slider(
                    1, MOST_DRAWS, draws.default, step=1, label="Noises", info=draws.help
                )
                confidence = gr.Slider(
                    0.5, 1, sure.default, step=0.01, label="Confidence", info=sure.help
                )
            with gr.Row():
                go = gr.Button("Explain", variant="primary", elem_id="explain")
                stop = gr.Button("Stop", elem_id="explain-stop", min_width=80)
        with gr.Column(scale=2, min_width=280):
            status = show.html_of(EMPTY, elem_id="explain-status")
            pictures = show.html_of(elem_id="explanation")
    picture.send(
        pad.reader(joint.image_shape, options),
        picture,
        picture,
        show_progress="hidden",
        concurrency_id="upload",
        api_visibility="private",
    )
    inputs = [picture, target, without, seed, tried, confidence]
    connect([go.click], stop, make(joint, options), inputs, [status, pictures], "explain")
