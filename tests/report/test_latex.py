"""report.tex: nothing in a record becomes a command, and every table is whole."""

from __future__ import annotations

import re

import pytest
from samples import compare_record, damaged, study_record
from tex import check, tokens

from sparsegrad_cli.report.latex import compare_latex, escape_latex, table_latex
from sparsegrad_cli.report.tables import Table

HOSTILE = 'a&b%c$d#e_f{g}h~i^j\\k<l>m|n"o'


@pytest.mark.parametrize(
    ("raw", "set_as"),
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
def test_characters_stay_characters(raw: str, set_as: str) -> None:
    assert escape_latex(raw) == set_as


def test_a_table_is_booktabs() -> None:
    rows = [("[x]", "1"), ("*", None), (HOSTILE, "2")]
    table = Table("100 % of it", ("name", "a long header & more"), rows, strong=frozenset({(0, 1)}))
    made = table_latex(table)
    check(made)
    lines = made.splitlines()
    assert r"\begin{tabular}{lr}" in lines and r"\caption{100 \% of it}" in lines
    assert [line for line in lines if line.endswith("rule")] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    assert r"{}[x] & \textbf{1} \\" in lines and r"{}* & not recorded \\" in lines
    assert r"name & \shortstack[r]{a long header\\\& more} \\" in lines


def test_the_check_can_fail() -> None:
    for bad in ("{", "}", "a & b", "x_1", "$a", r"\begin{table}", r"\begin{a}\end{b}"):
        with pytest.raises(AssertionError):
            check(bad)
    with pytest.raises(AssertionError):
        check("\\begin{tabular}{lr}\na & b & c \\\\\n\\end{tabular}")


def test_a_comparison_is_whole_and_loads_nothing_but_booktabs() -> None:
    for record in (study_record(), compare_record(), {}):
        made = compare_latex(record)
        check(made)
        commands = {token for token in tokens(made) if re.fullmatch(r"\\[a-zA-Z]+", token)}
        of_latex = r"\begin \end \centering \caption \small \scriptsize \footnotesize \textbf \par "
        of_latex += r"\setlength \tabcolsep \shortstack \smallskip \pm \times \geq \textless "
        of_latex += r"\textgreater \cdot"
        booktabs = r"\toprule \midrule \bottomrule"
        assert commands <= {*of_latex.split(), *booktabs.split()}
    text = compare_latex(study_record())
    assert "full & \\textbf{64.9 $\\pm$ 0.8} & 64.2 to 65.6 & 8/8" in text
    assert "No difference shown in the other pair of methods" in text


def test_what_was_not_fair_is_in_the_papers_form_too() -> None:
    record = study_record()
    for check_ in record["checks"]:
        check_["same_order"] = False
    made = compare_latex(record)
    check(made)
    assert "DID NOT HOLD: " in made and "did NOT have the same order" in made
    assert "Held: " in compare_latex(study_record())


def test_hostile_names_and_damaged_records() -> None:
    record = study_record()
    record["name"] = HOSTILE
    for part in (*record["rows"], *record["cells"]):
        part["method"] = part["method"].replace("core-1e-3", HOSTILE)
    record["methods"] = ["lora", HOSTILE, "full"]
    made = compare_latex(record)
    check(made)
    assert escape_latex(HOSTILE) in made
    for what, broken in damaged(compare_record()):
        check(compare_latex(broken)), what
