"""Tables, sections, and how each format escapes the text of records."""

from __future__ import annotations

import pytest

from sparsegrad_cli.report.document import Bullets, Column, Document, Section, Table
from sparsegrad_cli.report.render import escape_html, escape_latex, escape_markdown, render
from sparsegrad_cli.report.units import NOT_RECORDED


def one_table(table: Table) -> Document:
    return Document("title", "done", sections=[Section("section", [table])])


def test_a_table_has_one_row_per_record() -> None:
    columns: list[Column[int]] = [
        Column("number", str, words=True),
        Column("square", lambda n: str(n * n), strong=lambda n: n == 3),
    ]
    table = Table.of([2, 3], columns, "squares", ["a note"])
    assert table.rows == [("2", "4"), ("3", "9")]
    assert table.words == (True, False) and table.strong == {(1, 1)}


def test_columns_without_a_value_are_dropped() -> None:
    rows = [("x", NOT_RECORDED, "1", ""), ("y", NOT_RECORDED, NOT_RECORDED, "")]
    words = (True, False, False, False)
    table = Table("t", ("n", "a", "b", "c"), rows, words, strong=frozenset({(0, 2)}))
    kept = table.without_empty()
    assert kept.header == ("n", "b") and kept.strong == {(0, 1)}
    markdown = render(one_table(kept), "md")
    assert "| n | b |\n| :-- | --: |\n| x | **1** |\n| y | not recorded |\n" in markdown


def test_sections_without_content_are_left_out() -> None:
    document = Document("t", "done", sections=[Section("empty", [None, Bullets([])])])
    for form in ("html", "md", "tex"):
        assert "empty" not in render(document, form)


def test_folded_tables_are_folded_in_html_and_left_out_of_latex() -> None:
    table = Table("caption", ("a",), [("1",)], (True,), folded="Every one")
    page, markdown, latex = (render(one_table(table), form) for form in ("html", "md", "tex"))
    assert "<details><summary>Every one</summary>" in page
    assert "<details><summary>Every one</summary>\n\n**caption**" in markdown
    assert "caption" not in latex


@pytest.mark.parametrize(
    ("raw", "markdown"),
    [
        ("a|b", r"a\|b"),
        ("<i>&", "&lt;i>&amp;"),
        ("snake_case_name", "snake_case_name"),
        ("_em_", r"\_em\_"),
        ("two\nlines", "two lines"),
        ("\x1b[31m", r"␛\[31m"),
    ],
)
def test_markdown_syntax_is_escaped(raw: str, markdown: str) -> None:
    assert escape_markdown(raw) == markdown


def test_html_is_escaped_and_control_characters_are_shown() -> None:
    assert escape_html("<b>\"'&\x1b\u202e") == "&lt;b&gt;&quot;&#x27;&amp;␛\ufffd"


@pytest.mark.parametrize(
    ("raw", "latex"),
    [
        ("50 %", r"50 \%"),
        ("a_b", r"a\_b"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("−1.5 ± 0.2 ×100", r"$-$1.5 $\pm$ 0.2 $\times$100"),
        ("< 0.001", r"\textless{} 0.001"),
        ("naïve ł", "naïve ł"),
        ("中\u202e\x07", "U+4E2DU+202EU+0007"),
        ("two\nlines\tone", "two lines one"),
        ("≥\u00a010\u00a0%", r"$\geq$~10~\%"),
        ("^2~", r"\textasciicircum{}2\textasciitilde{}"),
    ],
)
def test_latex_syntax_is_escaped(raw: str, latex: str) -> None:
    assert escape_latex(raw) == latex
