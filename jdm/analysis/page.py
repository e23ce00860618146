"""Reports as one HTML page each: pictures are embedded, and nothing is loaded from elsewhere."""

import base64
from html import escape

from jdm.analysis import report as reports
from jdm.analysis.figures import Picture, picture
from jdm.analysis.report import Cells, Report

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #8886; }}
img {{ max-width: 100%; height: auto; }}
.protocol {{ opacity: 0.75; font-size: 0.9rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, body: list[str]) -> str:
    """A whole page. body: pieces of HTML."""
    return _PAGE.format(title=escape(title), body="\n".join(body))


def table(rows: Cells, marked: str = "") -> str:
    """Cells as a table, which scrolls sideways where the screen is narrow. marked: what begins and
    ends a cell that is shown in bold."""

    def cell(text: str) -> str:
        bold = bool(marked) and len(text) > 2 * len(marked) and text.startswith(marked)
        return f"<b>{escape(text.strip(marked))}</b>" if bold else escape(text)

    head = "".join(f"<th>{escape(text)}</th>" for text in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{cell(t)}</td>' for t in row)}</tr>\n" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def figure(drawn: Picture, name: str) -> str:
    """A picture, embedded; the page shows that of its theme. name: for those who cannot see it."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in drawn)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img src="{light}" alt="{escape(name)}"></picture>'


def paragraph(text: str) -> str:
    return f'<p class="protocol">{escape(text)}</p>'


def html(report: Report) -> str:
    """The content of report.html."""
    body = []
    for evaluator, parts in reports.sections(report):
        body += [f"<h2>{escape(evaluator)}</h2>", paragraph(report.title)]
        for name, value, rows in parts:
            body += [f"<h3>{escape(name)}</h3>"] if name else []
            drawn = None if value is None else picture(value)
            body += [figure(drawn, name)] if drawn else []
            body += [table(rows)]
    body += ["<h2>Protocol</h2>", table(reports.settings(report.protocol))]
    return page(report.title, body)


def files(report: Report) -> dict[str, str]:
    """{name: content} of the files of a report. report.json is last: where it is, all are."""
    return {
        "report.html": html(report),
        "report.md": reports.markdown(report),
        reports.REPORT: reports.to_json(report),
    }
