"""One self-contained HTML page: nothing fetched, no script, light and dark. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from sparsegrad_cli.report.labels import error_lines, status_of, status_words
from sparsegrad_cli.report.run_tables import subtitle, title_of
from sparsegrad_cli.report.tables import Fact, Table
from sparsegrad_cli.report.units import NOT_RECORDED

REFRESH_S = 30
_STYLE = resources.files("sparsegrad_cli.report").joinpath("page.css").read_text("utf-8")


def page(
    record: Mapping[str, Any],
    sections: Sequence[tuple[str, str]],
    lead: str,
    *,
    alive: bool = False,
) -> str:
    """A whole document.

    Args:
        record: what the page is about; gives title, status and error.
        sections: (heading, HTML) in order; those without content are left out.
        lead: HTML between the heading and the first section.
        alive: the file is being rewritten: a page shown looks again every ``REFRESH_S`` seconds.
    """
    shown = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#s{n}">{escape(h)}</a>' for n, (h, _) in enumerate(shown))
    body = "".join(
        f'<section id="s{n}"><h2>{escape(heading)}</h2>{content}</section>\n'
        for n, (heading, content) in enumerate(shown)
    )
    title = escape(title_of(record))
    again = f'<meta http-equiv="refresh" content="{REFRESH_S}">\n' if alive else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{again}'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{_heading(record)}{lead}<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )


def _heading(record: Mapping[str, Any]) -> str:
    status = status_of(record)
    mark = f'<span class="status {escape(status)}">{escape(status_words(status))}</span>'
    head = (
        f"<header><h1>{escape(title_of(record))}{mark}</h1>{paragraph(subtitle(record), dim=True)}"
    )
    error = error_lines(record.get("error"))
    if error:
        lines = "<br>".join(f"<b>{escape(label)}</b> {escape(value)}" for label, value in error)
        head += f'<div class="error">{lines}</div>'
    return head + "</header>\n"


def paragraph(raw: str, *, dim: bool = False) -> str:
    """A paragraph of plain text; nothing where there is none."""
    if not raw:
        return ""
    return f'<p class="dim">{escape(raw)}</p>' if dim else f"<p>{escape(raw)}</p>"


def verdict(lines: Sequence[str]) -> str:
    """What a comparison comes to, in sentences, set apart."""
    inner = "".join(paragraph(line) for line in lines)
    return f'<div class="verdict">{inner}</div>\n' if inner else ""


def cards(shown: Sequence[Fact]) -> str:
    """Headline figures, each with what it should be read against."""
    inner = "".join(
        f'<div class="fact"><span>{escape(fact.label)}</span><b>{escape(fact.value)}</b>'
        f"<span>{escape(fact.detail)}</span></div>"
        for fact in shown
    )
    return f'<div class="facts">{inner}</div>\n' if inner else ""


def drawing(svg: str | None, caption: str, missing: str = "") -> str:
    """A figure and what it means; ``missing`` in its place where there is nothing to draw."""
    if svg is None:
        return paragraph(missing, dim=True)
    plot = f'<div class="plot">{svg}</div>'
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>\n"


def html_table(table: Table | None, missing: str = "") -> str:
    """A table; ``missing`` in its place where there is none."""
    if table is None:
        return paragraph(missing, dim=True)
    head = "".join(
        f'<th class="word">{escape(name)}</th>' if table.is_words(c) else f"<th>{escape(name)}</th>"
        for c, name in enumerate(table.header)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(table, r, c) for c in range(len(row)))}</tr>\n"
        for r, row in enumerate(table.rows)
    )
    notes = bullets(table.notes)
    return (
        f'<div class="scroll"><table><caption><span>{escape(table.caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{notes}\n"
    )


def _cell(table: Table, row: int, column: int) -> str:
    raw = table.rows[row][column]
    classes = ["word"] if table.is_words(column) else []
    classes += ["none"] if raw is None else []
    mark = f' class="{" ".join(classes)}"' if classes else ""
    shown = escape(NOT_RECORDED if raw is None else raw)
    return f"<td{mark}>{f'<b>{shown}</b>' if (row, column) in table.strong else shown}</td>"


def bullets(notes: Sequence[str]) -> str:
    """Lines below a table or figure."""
    inner = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{inner}</ul>' if inner else ""


def folded(summary: str, content: str) -> str:
    """Content that is there when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n" if content else ""


def checked(lines: Sequence[tuple[bool | None, str]]) -> str:
    """Checks with a mark each: held, broken or not known."""
    kinds = {True: "held", False: "broken", None: "unknown"}
    inner = "".join(f'<li class="{kinds[held]}">{escape(line)}</li>' for held, line in lines)
    return f'<ul class="checks">{inner}</ul>\n'
