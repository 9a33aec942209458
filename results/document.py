"""A document as a list of blocks, and its two forms: Markdown, and one HTML file that loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from results.figures import Figure
from results.tables import Table


@dataclass(frozen=True)
class Heading:
    level: int
    text: str

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A table that few readers want to see: closed at first in HTML."""

    table: Table


Block = Heading | Text | Bullets | Table | Folded | Figure


def markdown(blocks: Iterable[Block], folder: Path) -> str:
    """`folder` is where the document goes: figures are linked from there."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Folded():
            return _markdown(block.table, folder)
        case Table():
            return _markdown_table(block)
        case Figure():
            place = block.path.relative_to(folder).as_posix()
            links = f"[PNG]({place}.png), [data]({place}.csv)"
            return f"![{block.caption}]({place}.svg)\n\n{block.caption} ({links})"


def _markdown_table(table: Table) -> str:
    columns = list(table.frame.columns)
    rules = ["---:" if table.numeric(column) else "---" for column in columns]
    rows = [columns, rules, *([cell.replace("|", "\\|") for cell in row] for row in table.cells())]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join((f"**{table.title}**", "", *lines, *(f"\n{note}" for note in table.notes)))


def html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """One page: styles and figures are inside; the links lead to the files beside it."""
    style = files("results").joinpath("page.css").read_text(encoding="utf-8")
    headings = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    contents = "".join(f'<li><a href="#{h.anchor}">{escape(h.text)}</a></li>' for h in headings)
    body = "\n".join(_html(block, number, folder) for number, block in enumerate(blocks))
    top, _, rest = body.partition("</h1>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{top}</h1>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n{rest}\n</main>\n</body>\n</html>\n'
    )


def _html(block: Block, number: int, folder: Path) -> str:
    match block:
        case Heading():
            return f'<h{block.level} id="{block.anchor}">{escape(block.text)}</h{block.level}>'
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Bullets():
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
        case Folded():
            inside = _html_table(block.table, captioned=False)
            return f"<details><summary>{escape(block.table.title)}</summary>{inside}</details>"
        case Table():
            return _html_table(block)
        case Figure():
            return _html_figure(block, number, folder)


def _html_table(table: Table, captioned: bool = True) -> str:
    columns = list(table.frame.columns)
    kind = {column: ' class="number"' if table.numeric(column) else "" for column in columns}
    head = "".join(f'<th scope="col"{kind[column]}>{escape(column)}</th>' for column in columns)
    rows = []
    for row in table.cells():
        cells = [
            f'<th scope="row">{escape(cell)}</th>'
            if place < table.heads
            else f"<td{_status(column, cell) or kind[column]}>{escape(cell)}</td>"
            for place, (column, cell) in enumerate(zip(columns, row, strict=True))
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{escape(table.title)}</caption>" if captioned else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title, quote=True)}">'
        f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>{notes}"
    )


def _status(column: str, cell: str) -> str:
    return f' class="status {cell}"' if column == "status" else ""


def _html_figure(figure: Figure, number: int, folder: Path) -> str:
    place = escape(figure.path.relative_to(folder).as_posix(), quote=True)
    svg = inline(figure.path.with_name(figure.path.name + ".svg").read_text(encoding="utf-8"), f"f{number}-")
    label = escape(figure.caption, quote=True)
    links = " ".join(f'<a href="{place}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png", "csv"))
    return (
        f'<figure><div class="scroll paper" role="img" tabindex="0" aria-label="{label}">{svg}</div>'
        f"<figcaption>{escape(figure.caption)} {links}</figcaption></figure>"
    )


def inline(svg: str, prefix: str) -> str:
    """An SVG file as a part of a page: without prolog and metadata, its ids and styles its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', svg)
    return re.sub(r"\n\s*", "\n", svg).strip()
