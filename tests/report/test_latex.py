"""report.tex: text of a record never becomes a command, and every table is complete."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.latex import check_latex, tokens
from support.record_samples import compare_record, study_of, study_record

from sparsegrad_cli.report.document import Document, Table
from sparsegrad_cli.report.render import escape_latex, render
from sparsegrad_cli.report.study import study_document
from sparsegrad_cli.report.units import NOT_RECORDED

HOSTILE = 'a&b%c$d#e_f{g}h~i^j\\k<l>m|n"o'


def latex(record: dict[str, Any]) -> str:
    made = render(study_document(study_of(record)), "tex")
    check_latex(made)
    return made


def test_a_table_uses_booktabs() -> None:
    rows = [("[x]", "1"), ("*", NOT_RECORDED), (HOSTILE, "2")]
    header = ("name", "a long header & more")
    table = Table("100 % of it", header, rows, (True, False), strong=frozenset({(0, 1)}))
    made = render(Document("t", "done", lead=[table]), "tex")
    check_latex(made)
    lines = made.splitlines()
    assert r"\begin{tabular}{lr}" in lines and r"\caption{100 \% of it}" in lines
    rules = [line for line in lines if line.endswith("rule")]
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert r"{}[x] & \textbf{1} \\" in lines and r"{}* & not recorded \\" in lines
    assert r"name & \shortstack[r]{a long header\\\& more} \\" in lines


def test_the_latex_check_can_fail() -> None:
    for bad in ("{", "}", "a & b", "x_1", "$a", r"\begin{table}", r"\begin{a}\end{b}"):
        with pytest.raises(AssertionError):
            check_latex(bad)
    with pytest.raises(AssertionError):
        check_latex("\\begin{tabular}{lr}\na & b & c \\\\\n\\end{tabular}")


def test_a_study_needs_only_booktabs() -> None:
    allowed = (
        r"\begin \end \centering \caption \small \scriptsize \footnotesize \textbf \par "
        r"\setlength \tabcolsep \shortstack \smallskip \pm \times \geq \textless \textgreater "
        r"\cdot \toprule \midrule \bottomrule"
    )
    for record in (study_record(), compare_record(), {}):
        found = tokens(latex(record))
        assert {t for t in found if re.fullmatch(r"\\[a-zA-Z]+", t)} <= set(allowed.split())
    text = latex(study_record())
    assert "full & \\textbf{64.9 $\\pm$ 0.8} & 64.2 to 65.6 & 8/8" in text
    assert "No difference shown in the other pair of methods" in text


def test_a_failed_check_is_shown() -> None:
    record = study_record()
    for check_ in record["checks"]:
        check_["same_order"] = False
    made = latex(record)
    assert "DID NOT HOLD: " in made and "did NOT have the same order" in made
    assert "Held: " in latex(study_record())


def test_hostile_names_are_escaped() -> None:
    record = study_record()
    record["name"] = HOSTILE
    for part in (*record["rows"], *record["cells"]):
        part["method"] = part["method"].replace("core-1e-3", HOSTILE)
    record["methods"] = ["lora", HOSTILE, "full"]
    assert escape_latex(HOSTILE) in latex(record)
