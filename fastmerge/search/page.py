"""A report's files: Markdown, pictures, and a page that reads alone, on a phone and in print."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from fastmerge.evaluation.journal import write_own

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;
color:#222}table{border-collapse:collapse;margin:1rem 0;font-size:13px;display:block;
max-width:100%;overflow-x:auto}td,th{border:1px solid #ccc;
padding:.25rem .5rem;text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:1rem;
overflow:auto}code{background:#f5f5f5}@media print{body{max-width:none;margin:0;font-size:10pt}
table{display:table;font-size:8pt}tr,img{break-inside:avoid}pre{white-space:pre-wrap}}"""


def write_report(out: Path, title: str, text: str, pictures: Mapping[str, bytes]) -> None:
    """The pictures, report.md and report.html in a run's folder. Raises FastmergeError where they
    cannot be written.
    """
    for name, data in pictures.items():
        write_own(out / name, data)
    write_own(out / "report.md", text)
    write_own(out / "report.html", page(title, text, pictures))


def page(title: str, text: str, pictures: Mapping[str, bytes]) -> str:
    """The Markdown of a report as one self-contained page, pictures inside."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, data in pictures.items():
        inside = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        body = body.replace(f'src="{name}"', f'src="{inside}"')
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # Nothing is fetched, whatever a name or a schedule says.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "img-src data:; style-src 'unsafe-inline'\"><title>"
        f"{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}</body></html>\n"
    )
