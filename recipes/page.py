"""One HTML page of results that needs nothing else: tables from Markdown, pictures within, no script, no network."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

BROAD = 1030  # pixels; pictures of one column are 1020 wide

# Wide tables scroll by themselves, with their first column in place: the page never grows wider than the screen.
_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --shade: #f6f8fa; --link: #0550ae; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff;
       overflow-wrap: anywhere; }
main, header { max-width: 1240px; margin: 0 auto; padding: 0 16px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.2rem 0 .4rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .5rem; padding-top: .8rem;
     border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; } h4 { font-size: 1rem; margin: 1.3rem 0 .4rem; }
a { color: var(--link); } p, li { max-width: 78ch; } .soft { color: var(--soft); font-size: .875rem; }
.claim p, .missing p { margin: .4rem 0; }
.claim { border-left: 4px solid #0072b2; padding: .1rem 0 .1rem .8rem; }
.missing { border-left: 4px solid #d55e00; padding: .1rem 0 .1rem .8rem; }
.wide { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 6px;
        width: fit-content; max-width: 100%; }
.wide:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { white-space: nowrap; } td:first-child, .settings td { white-space: normal; }
th { background: var(--shade); } tr:last-child td { border-bottom: 0; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--shade); max-width: 45vw; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; margin: 1rem 0; }
figure { margin: 0; flex: 0 1 480px; min-width: 0; } img { display: block; width: 100%; height: auto; }
.broad { overflow-x: auto; } .broad img { min-width: 640px; } figure:has(.broad) { flex-basis: 900px; }
figcaption { font-size: .875rem; color: var(--soft); margin-top: .3rem; }
code { font-size: .9em; background: var(--shade); padding: .1em .3em; border-radius: 4px; }
pre { overflow-x: auto; background: var(--shade); padding: .6rem; border-radius: 6px; } pre code { padding: 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str  # anchor and folder
    title: str
    claim: str  # of the paper
    source: str  # where the rows are from, or why there are none
    markdown: str | None = None  # None: there are no rows to show
    pictures: Sequence[tuple[Path, str]] = ()  # PNG files and captions
    settings: dict[str, object] = field(default_factory=dict)


def render_markdown(text: str) -> str:
    """HTML of Markdown with tables, each in a box that scrolls; HTML within the text is shown, not obeyed."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return str(markdown.render(text))


def lowered(markdown: str) -> str:
    """Markdown whose headings are two levels lower."""
    return re.sub(r"^(#+ )", r"##\1", markdown, flags=re.MULTILINE)


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole HTML document; introduction is Markdown."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # or the browser asks for one
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>{html.escape(title)}</h1></header><main>",
        render_markdown(introduction),
        *map(_section, sections),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _section(section: Section) -> str:
    kind = "soft" if section.markdown is not None else "missing"
    parts = [
        f'<section id="{html.escape(section.name)}"><h2>{html.escape(section.title)}</h2>',
        f'<div class="claim">{render_markdown(section.claim)}</div>',
        f'<div class="{kind}">{render_markdown(section.source)}</div>',
    ]
    if section.pictures:
        parts.append(f'<div class="pictures">{"".join(_picture(*picture) for picture in section.pictures)}</div>')
    if section.markdown is not None:
        parts.append(render_markdown(lowered(section.markdown)))
    if section.settings:
        cells = ((html.escape(name), html.escape(str(value))) for name, value in sorted(section.settings.items()))
        lines = "".join(f"<tr><td>{name}</td><td><code>{value}</code></td></tr>" for name, value in cells)
        table = f'<div class="wide settings" tabindex="0"><table>{lines}</table></div>'
        parts.append(f"<details><summary>Settings of this run</summary>{table}</details>")
    return "\n".join([*parts, "</section>"])


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    with Image.open(path) as opened:
        if opened.width > BROAD:  # its letters would be too small on a telephone: it scrolls
            image = f'<div class="broad" tabindex="0">{image}</div>'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
