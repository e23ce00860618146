"""The tab Classify: class probabilities of a visitor's picture, with their calibration."""

from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np

from jdm.joint import Joint, classify
from jdm.serve import choices, pad, show, uploads
from jdm.serve.about import Facts
from jdm.serve.jobs import MODEL, guarded
from jdm.serve.options import ServeOptions

EMPTY = "Upload a picture, draw one, use the camera, or take one of the examples."


def make(joint: Joint, options: ServeOptions) -> Callable[[str | None], str]:
    """The handler: the value of a pad -> the probabilities as HTML."""
    names = choices.class_names(joint)

    @guarded(outputs=1)
    def handler(value: str | None) -> str:
        if not (picture := pad.content_of(value)["picture"]):
            return show.status(EMPTY)
        pixels = uploads.pixels_of(picture, joint.image_shape, options)
        with MODEL:
            found = np.asarray(classify(joint, pixels[None], batch_size=1))[0]
        sees = show.figure(pixels, "what the model sees", f"what the model sees, {_size(pixels)}")
        bars = f'<div class="jdm-wide">{show.bars(names, found)}</div>'
        return f'<div class="jdm-row">{sees}{bars}</div>'

    return handler


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} × {pixels.shape[0]} pixels"


def tab(joint: Joint, facts: Facts, options: ServeOptions, examples: dict) -> None:
    """Adds the contents of the tab. examples: of the pad."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = pad.make(options=options, elem_id="classify-pad", **examples)
            go = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column(scale=1, min_width=280):
            found = show.html_of(EMPTY, elem_id="probabilities")
            show.html_of(facts.calibration)
    picture.send(
        pad.reader(joint.image_shape, options),
        picture,
        picture,
        show_progress="hidden",
        concurrency_id="upload",
        concurrency_limit=2,
        api_name="read_picture",
    )
    handler = make(joint, options)
    settings: dict[str, Any] = dict(
        show_progress="hidden", trigger_mode="always_last", concurrency_id="model"
    )
    go.click(handler, picture, found, **settings, api_name="classify")
    for event in (picture.picked, picture.cleared):
        event(handler, picture, found, **settings, api_visibility="private")
