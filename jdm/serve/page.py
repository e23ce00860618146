"""The page: its tabs, and the pictures that the model generates for them at the start."""

import html
from pathlib import Path

import gradio as gr
import numpy as np

from jdm.joint import Joint, classify
from jdm.sampling.stepwise import sample_stepwise
from jdm.serve import about, choices, explain, generate
from jdm.serve import classify as classify_tab
from jdm.serve.about import Facts
from jdm.serve.options import ServeOptions

CSS = Path(__file__).with_name("page.css").read_text()
EXAMPLES = 8
AT_ONCE = 4  # as many as the tab Generate makes by default, so that their program is compiled
TITLE = "jdm"
# No font is loaded from a server.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def examples_of(joint: Joint) -> dict:
    """Pictures by the model, as a pad takes them; compiles what the tabs need first."""
    count = min(EXAMPLES, joint.model.num_classes)
    if joint.model.multi_label:
        labels, names = None, [f"example {i + 1}" for i in range(count)]
    else:
        labels = list(range(count)) if joint.has_classifier else None
        names = choices.class_names(joint)[:count]
    seeds = range(100, 100 + count)
    *_, samples = sample_stepwise(joint, labels=labels, seeds=seeds, batch_size=AT_ONCE)
    if joint.has_classifier:
        classify(joint, samples.images[:1], batch_size=1)
    border = np.concatenate([samples.images[:, 0], samples.images[:, -1]]).reshape(
        -1, joint.image_shape[2]
    )
    colour = np.broadcast_to(np.median(border, axis=0).astype(int), 3)
    background = f"rgb({', '.join(map(str, colour))})"
    return dict(examples=samples.images, names=names, background=background)


def build(joint: Joint, path: str, facts: Facts, options: ServeOptions) -> gr.Blocks:
    """The page of a model. path: of its checkpoint, as the user wrote it."""
    examples = examples_of(joint) if joint.has_diffusion else _empty(joint)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        what = html.escape(f"{path}, trained on {joint.config.data.name}")
        title = f"<h1>A joint diffusion model</h1><p>{what}</p>"
        gr.HTML(f'<div class="jdm-title">{title}</div>', apply_default_css=False)
        with gr.Tabs():
            if joint.has_diffusion:
                with gr.Tab("Generate", id="generate"):
                    generate.tab(joint, options)
            if joint.has_classifier:
                with gr.Tab("Classify", id="classify"):
                    classify_tab.tab(joint, facts, options, examples)
            if joint.has_diffusion and joint.has_classifier:
                with gr.Tab("Explain", id="explain"):
                    explain.tab(joint, options, examples)
            with gr.Tab("About", id="about"):
                gr.HTML(about.page(joint, path, facts, options), apply_default_css=False)
    blocks.queue(max_size=options.queue, default_concurrency_limit=1)
    return blocks


def _empty(joint: Joint) -> dict:
    none = np.zeros((0, *joint.image_shape), np.uint8)
    return dict(examples=none, names=[], background="black")
