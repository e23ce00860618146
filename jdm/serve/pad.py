"""The pad: where a picture is uploaded, photographed, pasted, drawn, or taken from examples.

It is Gradio's HTML component with pad.js, in place of gr.Image and gr.ImageEditor: those write
each upload to a file, and decode it before its size can be checked.
"""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from jaxtyping import UInt8

from jdm.serve import show, uploads
from jdm.serve.jobs import sentence_of
from jdm.serve.options import ServeOptions

HERE = Path(__file__).parent
EXAMPLE = 56  # pixels
_COLOURS = {
    1: '<label>Colour <select class="pad-colour"><option value="#fff">white</option>'
    '<option value="#000">black</option></select></label>',
    3: '<label>Colour <input type="color" class="pad-colour" value="#d02020"></label>',
}
_MODES = """
<fieldset class="pad-mode" aria-label="What the brush does">
<label><input type="radio" name="NAME" value="region" checked>mark what may change</label>
<label><input type="radio" name="NAME" value="draw">draw</label>
<button type="button" data-do="unmark">Unmark</button></fieldset>"""
_TEMPLATE = """
<div class="pad">
<div class="pad-view"><canvas class="pad-picture" width="320" height="320"></canvas>
<canvas class="pad-marks" width="320" height="320" tabindex="0" role="img" aria-label="ABOUT. Draw
with the mouse or a finger. Keyboard: arrows move, Space and Shift with an arrow draw."></canvas>
<span class="pad-cursor" aria-hidden="true"></span>
<video hidden muted playsinline></video></div>
<div class="pad-tools"><button type="button" data-do="choose">Upload</button>
<input type="file" accept="image/*" aria-label="A picture to upload" hidden>
<button type="button" data-do="camera">Camera</button>
<button type="button" data-do="snap" hidden>Take the picture</button>
<button type="button" data-do="clear">Clear</button></div>
<div class="pad-tools">COLOUR
<label>Brush <input type="range" class="pad-size" min="2" max="30" value="12"></label></div>
MODES
<p class="pad-note" role="status"></p>
<div class="pad-examples" role="group" aria-label="Examples, which the model has generated">
EXAMPLES</div></div>"""


def make(
    *,
    examples: UInt8[np.ndarray, "n h w c"],
    names: Sequence[str],
    background: str,
    options: ServeOptions,
    region: bool = False,
    **settings: Any,
) -> gr.HTML:
    """A pad. Its value is JSON, which `content_of` reads.

    names: of the examples. background: of the empty picture, as in CSS. region: whether a region
    can be marked too. settings: of the component.
    """
    buttons = [
        f'<button type="button" aria-label="example: {html.escape(name)}" '
        f'title="{html.escape(name)}"><img src="{show.picture(image)}" alt=""></button>'
        for image, name in zip(examples, names, strict=True)
    ]
    template = _TEMPLATE
    for word, text in {
        "MODES": _MODES.replace("NAME", "jdm-brush") if region else "",
        "COLOUR": _COLOURS[examples.shape[-1]],
        "ABOUT": "The picture to explain" if region else "The picture to classify",
        "EXAMPLES": "".join(buttons),
    }.items():
        template = template.replace(word, text)
    # The template is one of JavaScript and of Handlebars.
    for sign in "`{}$\\":
        template = template.replace(sign, f"&#{ord(sign)};")
    return gr.HTML(
        "{}",
        html_template=template,
        apply_default_css=False,
        js_on_load=(HERE / "pad.js").read_text(),
        background=background,
        region=region,
        megabytes=options.megabytes,
        **settings,
    )


def content_of(value: str | None) -> dict[str, str]:
    """{"picture", "region", "sent"} of the value of a pad: data URLs, or ""."""
    try:
        found = json.loads(value or "{}")
    except ValueError:
        found = {}
    found = found if isinstance(found, dict) else {}
    return {name: str(found.get(name) or "") for name in ("picture", "region", "sent")}


def reader(shape: tuple[int, int, int], options: ServeOptions) -> Callable[[str | None], str]:
    """The handler of the event "send": the value of a pad -> its value with what the model sees of
    the picture that was sent, or with a note that says why it is refused."""

    def read(value: str | None) -> str:
        try:
            pixels = uploads.pixels_of(content_of(value)["sent"], shape, options)
        except Exception as error:
            return json.dumps({"picture": "", "note": sentence_of(error)})
        note = f"The model sees {shape[1]} × {shape[0]} pixels of the middle square."
        return json.dumps({"picture": show.picture(pixels), "note": note})

    return read
