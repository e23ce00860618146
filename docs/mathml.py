"""Formulas as MathML, which browsers draw without a script or a font from elsewhere."""

import html
import re

from docutils import nodes
from latex2mathml.converter import convert

TAG = re.compile(r"\\tag\{([^}]*)\}")


def inline(latex: str) -> str:
    """The MathML of a formula in a line of text."""
    return convert(latex)


def display(latex: str) -> str:
    """A formula on a line of its own; the number in its tag stands at the right."""
    number = TAG.search(latex)
    shown = f'<span class="eqno">({html.escape(number[1])})</span>' if number else ""
    formula = convert(TAG.sub("", latex).strip(), display="block")
    return f'<div class="math" style="overflow-x: auto">{shown}{formula}</div>\n'


def setup(app) -> None:
    """Makes this the way that Sphinx writes formulas."""

    def visit_inline(self, node):
        self.body.append(inline(node.astext()))
        raise nodes.SkipNode

    def visit_display(self, node):
        self.body.append(display(node.astext()))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    app.config.html_math_renderer = "mathml"
