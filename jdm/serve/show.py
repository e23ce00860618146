"""Results as HTML with the pictures inside, so that no file is written."""

import base64
import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jdm import plot

LEAST = 224  # pixels: small images are enlarged to about this, each pixel a square


def url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(image: UInt8[np.ndarray, "h w c"], least_width: int = 1) -> str:
    """The data URL of a PNG."""
    return url(plot.png(image, least_width), "image/png")


def figure(image: UInt8[np.ndarray, "h w c"], alt: str, caption: str) -> str:
    text = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure><img src="{picture(image)}" alt="{html.escape(alt)}">{text}</figure>'


_BUSY = 'aria-busy="true"'


def status(text: str, busy: bool = False) -> str:
    """A line of status. busy: of work that has not ended."""
    mark = f" {_BUSY}" if busy else ""
    return f'<p class="jdm-status" role="status"{mark}>{html.escape(text)}</p>' if text else ""


# JavaScript from the line of status of work that has ended, however it did, to the next line.
STOPPED_IF_BUSY = (
    f"shown => shown?.includes({json.dumps(_BUSY)}) ? {json.dumps(status('Stopped.'))} : shown"
)


def html_of(text: str = "", **settings: Any) -> Any:
    """A component of Gradio for the HTML of this file, which shows a line of status at first."""
    import gradio

    return gradio.HTML(status(text), apply_default_css=False, **settings)


def grid(images: UInt8[np.ndarray, "n h w c"], captions: Sequence[str]) -> str:
    figures = [
        figure(one, f"image: {text}", text) for one, text in zip(images, captions, strict=True)
    ]
    return f'<div class="jdm-grid">{"".join(figures)}</div>'


def download(content: bytes, kind: str, name: str, text: str) -> str:
    """A link that saves a file, without the server."""
    return f'<a class="jdm-download" download="{name}" href="{url(content, kind)}">{text}</a>'


def bars(names: Sequence[str], values: Float[np.ndarray, " k"], most: int = 10) -> str:
    """Probabilities as a table with bars, the largest first."""
    rows = []
    for k in np.argsort(-values, kind="stable")[:most]:
        share, name = float(values[k]), html.escape(names[k])
        bar = f'<div class="jdm-bar"><div style="width:{100 * share:.1f}%"></div></div>'
        rows.append(f'<tr><th scope="row">{name}</th><td>{bar}</td><td>{share:.1%}</td></tr>')
    left = len(values) - len(rows)
    more = f"<p>and {left} more classes</p>" if left > 0 else ""
    return f'<table class="jdm-bars"><tbody>{"".join(rows)}</tbody></table>{more}'


def table(rows: Sequence[tuple[str, str]]) -> str:
    cells = [
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in rows
    ]
    return f'<table class="jdm-table"><tbody>{"".join(cells)}</tbody></table>'


# Shows one of the frames; the slider stands in the element that holds them.
_SLIDE = (
    "const all=this.closest('.jdm-film').querySelectorAll('.jdm-frame');"
    "all.forEach((one,i)=>{one.hidden=i!=this.value})"
)


def film(first: str, frames: Sequence[str], label: str, chosen: int) -> str:
    """A picture beside one of several frames, HTML each, and a slider that chooses the frame."""
    shown = [
        f'<div class="jdm-frame"{"" if i == chosen else " hidden"}>{one}</div>'
        for i, one in enumerate(frames)
    ]
    slider = (
        f'<label class="jdm-slider">{html.escape(label)}<input type="range" min="0" '
        f'max="{len(frames) - 1}" step="1" value="{chosen}" oninput="{_SLIDE}"></label>'
    )
    return (
        f'<div class="jdm-film"><div class="jdm-row">{first}{"".join(shown)}</div>'
        f"{slider if len(frames) > 1 else ''}</div>"
    )
