"""Render documents as HTML, Markdown and LaTeX, and write the reports of runs and studies.

Each format escapes every value that a template prints, as Jinja2 does for HTML. Text of a record
therefore never becomes markup, a formula or a command.
"""

from __future__ import annotations

import hashlib
import html
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.untrusted_text import printable_text
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.document import Block, Document, Drawing, SideBySide
from sparsegrad_cli.report.run import run_document
from sparsegrad_cli.report.study import ChartCache, study_document
from sparsegrad_cli.report.units import NOT_RECORDED, status_words

Form = Literal["html", "md", "tex"]
# Reads the answers in the folder of a study.
AnswersReader = Callable[[Path, StudyRecord], Sequence[SideBySide]]

_UNFOLDED_QUESTIONS = 3
_HEADER_WIDTH = 14  # Characters of one line of a LaTeX header.
_WIDE_COLUMNS = 7  # LaTeX sets tables with more columns in a smaller font.
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "\u00a0": "~",
    "\u2212": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "–": "--",
    "·": r"$\cdot$",
}
_LAST_LATIN = 0x17F  # Every engine's default fonts have the characters up to this one.


def render(document: Document, form: Form) -> str:
    """Return the document as an HTML page, a Markdown text or LaTeX tables.

    LaTeX includes the tables, conclusions and checks of the sections for papers.
    """
    environment = _ENVIRONMENTS[form]
    macros = environment.get_template(f"blocks.{form}").module

    def drawn(blocks: Sequence[Block | None]) -> list[Markup]:
        """Return the blocks with content in this format."""
        shown = [block for block in blocks if block is not None]
        parts = [getattr(macros, type(block).__name__.lower())(block) for block in shown]
        return [part.strip() for part in parts if part.strip()]

    sections = [
        (section, parts)
        for section in document.sections
        if (section.in_paper or form != "tex") and (parts := drawn(section.blocks))
    ]
    text: str = environment.get_template(f"report.{form}").render(
        document=document,
        status=status_words(document.status),
        lead=drawn(document.lead),
        sections=sections,
    )
    return text


def escape_html(raw: str) -> str:
    """Escape text for HTML; show control characters as their symbols."""
    return html.escape(printable_text(raw))


def escape_markdown(raw: str) -> str:
    """Escape text for one line of GitHub Markdown: cells, tags, links, emphasis and formulas."""
    line = " ".join(printable_text(raw).split()).replace("&", "&amp;").replace("<", "&lt;")
    # Keep underscores inside words, which are common in names and mean no emphasis on GitHub.
    return re.sub(r"([\\`*|~$\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def escape_latex(raw: str) -> str:
    """Escape text for one line of LaTeX: commands, comments, columns and formulas.

    Characters outside the Latin scripts are written as ``U+4E2D``, since pdfTeX's fonts lack them.
    """
    line = " ".join(raw.replace("\u00a0", "\0").split()).replace("\0", "\u00a0")
    return "".join(_LATEX.get(character) or _latin(character) for character in line)


def _latin(character: str) -> str:
    code = ord(character)
    there = 0x20 <= code <= _LAST_LATIN and not 0x7F <= code < 0xA0
    return character if there else f"U+{code:04X}"


def _markdown_lines(raw: str) -> Markup:
    """Return text of several lines for one cell of a table, with its indentation."""
    return Markup("<br>").join(
        Markup("&nbsp;" * (len(line) - len(line.lstrip())) + escape_markdown(line))
        for line in printable_text(raw).split("\n")
    )


def _labelled(drawing: Drawing, title: str, alt: str) -> Markup:
    """Return a drawing as an image with an alternative text.

    Its ids get a suffix, because drawings of one page share markers and would repeat their ids.
    """
    suffix = hashlib.sha256(f"{title}\n{drawing.svg}".encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|url\(#|href="#)([\w.-]+)', rf"\g<1>\g<2>-{suffix}", drawing.svg)
    label = f'<svg role="img" aria-label="{escape_html(alt)}"'
    return Markup(svg.replace("<svg", label, 1))


def _guarded(line: str) -> Markup:
    r"""Protect the start of a line: TeX reads ``[`` and ``*`` after ``\\`` as its arguments."""
    return Markup("{}" + line if line[:1] in ("[", "*") else line)


def _stacked(name: str, words: bool) -> Markup:
    """Return a LaTeX header, broken into several lines if it is long."""
    parts = textwrap.wrap(name, _HEADER_WIDTH, break_long_words=False) or [""]
    lines = r"\\".join(_guarded(escape_latex(part)) for part in parts)
    side = "l" if words else "r"
    return Markup(lines if len(parts) == 1 else rf"\shortstack[{side}]{{{lines}}}")


def _environment(escape: Callable[[str], str], **syntax: Any) -> Environment:
    """Return a Jinja2 environment that passes every printed value through ``escape``."""

    def finalize(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        loader=PackageLoader("sparsegrad_cli.report"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **syntax,
    )
    environment.globals.update(
        not_recorded=NOT_RECORDED,
        unfolded_questions=_UNFOLDED_QUESTIONS,
        wide_columns=_WIDE_COLUMNS,
    )
    environment.filters.update(
        lines=_markdown_lines,
        labelled=_labelled,
        guarded=_guarded,
        stacked=_stacked,
    )
    return environment


_ENVIRONMENTS = {
    "html": _environment(escape_html),
    "md": _environment(escape_markdown),
    "tex": _environment(
        escape_latex,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    ),
}


# --- reports in folders


def write_run_report(folder: Path, run: RunRecord) -> None:
    """Write ``report.md`` and ``report.html`` of a training or calibration run.

    Raises:
        DiskError: a file could not be written.
    """
    _write(folder, run_document(run), "md", "html")


def write_study_report(
    folder: Path,
    study: StudyRecord,
    answers: Sequence[SideBySide] = (),
    charts: ChartCache | None = None,
) -> None:
    """Write ``report.md``, ``report.tex`` and ``report.html``, with the same numbers in each.

    Args:
        folder: the study's folder.
        study: its record.
        answers: the answers of its models to the same questions.
        charts: the charts of the previous page.

    Raises:
        DiskError: a file could not be written.
    """
    charts = charts or ChartCache()
    _write(folder, study_document(study, answers, charts), "md", "tex", "html")
    charts.finish_page()


def write_reports(folder: Path, document: Document) -> None:
    """Write ``report.md`` and ``report.html`` of a document.

    Raises:
        DiskError: a file could not be written.
    """
    _write(folder, document, "md", "html")


def _write(folder: Path, document: Document, *forms: Form) -> None:
    for form in forms:
        write_text_atomic(folder / f"report.{form}", render(document, form))


class LiveReport:
    """Write the page each time compare.json is written, and all reports at the end.

    A page that cannot be written does not stop a study that runs for hours; only the first such
    error is printed. Errors of the reports at the end are raised.

    Args:
        folder: the study's folder.
        tell: receives the error.
        read_answers: reads the answers in the folder.
    """

    def __init__(
        self, folder: Path, tell: Callable[[str], None], read_answers: AnswersReader
    ) -> None:
        self._folder, self._tell, self._read_answers = folder, tell, read_answers
        self._charts = ChartCache()
        self._told = False

    def __call__(self, study: StudyRecord) -> None:
        if study.status != "running":
            answers = self._read_answers(self._folder, study)
            write_study_report(self._folder, study, answers, self._charts)
            return
        try:
            answers = self._read_answers(self._folder, study)
            _write(self._folder, study_document(study, answers, self._charts), "html")
            self._charts.finish_page()
        except Exception as error:
            if not self._told:
                self._tell(f"the live report could not be written: {error}")
            self._told = True
