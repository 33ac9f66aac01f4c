"""Terminal and Markdown: the same figures, in the room there is, and text that stays text."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from samples import compare_record, damaged, run_record

from sparsegrad_cli.report.markdown import compare_markdown, run_markdown
from sparsegrad_cli.report.tables import Table
from sparsegrad_cli.report.terminal import calibration_table, compare_table, run_table
from sparsegrad_cli.report.terminal_tables import pieces


def shown(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_run_table_fits_a_terminal_and_says_the_figures() -> None:
    text = shown(run_table(run_record()))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for figure in ("61.0", "219,554", "6.2 steps/s", "backward", "evaluate 5.0 s"):
        assert figure in text


def test_calibration_table_says_cost_and_energy() -> None:
    record = run_record() | {"command": "calibrate"}
    text = shown(calibration_table(record))
    for figure in ("5.0 s", "original", "38.0", "80.0", "intermediate.dense"):
        assert figure in text


def test_compare_table_says_scores_failures_and_checks() -> None:
    text = shown(compare_table(compare_record()))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for words in (
        "65.5 ± 1.2",
        "60.0 (1/2)",
        "rank 3; 1 of 2 seeds done",
        "No difference shown in the one pair of methods",
        "same model, head, order, data and precision",
    ):
        assert words in " ".join(text.split())


def test_a_broken_check_is_shouted() -> None:
    record = compare_record()
    record["checks"][0]["same_order"] = False
    sentence = "methods did NOT have the same order"
    assert sentence in shown(compare_table(record))
    assert sentence in compare_markdown(record)


@pytest.mark.parametrize("name", ["[bold red]x[/]", "a|b", "<b>x</b>", "`x`"])
def test_names_are_no_markup(name: str) -> None:
    record = compare_record()
    record["rows"][1]["method"] = name
    assert name in shown(compare_table(record))
    lines = [line for line in compare_markdown(record).splitlines() if line.startswith("| ")]
    widths = {}
    for line in lines:  # a bar inside a name must not open a cell
        cells = line.replace(r"\|", "").count("|")
        widths.setdefault(cells, line)
    assert "<b>" not in "".join(lines)
    plain = {
        line.replace(r"\|", "").count("|")
        for line in compare_markdown(compare_record()).splitlines()
        if line.startswith("| ")
    }
    assert set(widths) == plain


def test_markdown_has_the_figures_of_the_terminal() -> None:
    run, compare = run_markdown(run_record()), compare_markdown(compare_record())
    for figure in ("61.0", "219,554", "6.2 steps/s", "38.0"):
        assert figure in run
    for figure in ("65.5 ± 1.2", "out of memory", "3 of 4 cells done", "61.2 ± 1.0"):
        assert figure in compare


def test_no_damage_stops_a_text_report() -> None:
    for what, broken in damaged(run_record()):
        assert shown(run_table(broken)), what
        assert shown(calibration_table(broken)), what
        assert "nan" not in run_markdown(broken).lower().split(), what
    for what, broken in damaged(compare_record()):
        assert shown(compare_table(broken)), what
        assert compare_markdown(broken), what


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_figure_is_cut_short_however_narrow_the_terminal(width: int) -> None:
    record = compare_record()
    for row in record["rows"]:
        row |= {"trainable": 17_694_720, "peak_bytes": 1_586.4 * 2**20, "train_s": 8_765.4}
        row |= {"beyond_weights_bytes": 1_140.8 * 2**20, "adapter_bytes": 67.5 * 2**20}
    text = shown(compare_table(record), width)
    tables = [line for line in text.splitlines() if "1,586.4" in line or "1,140.8" in line]
    assert tables and all(len(line) <= width for line in tables)
    assert "…" not in text
    for figure in ("17,694,720", "1,586.4", "1,140.8", "67.5"):
        assert text.count(figure) >= len(record["rows"]), figure


def test_pieces_hold_every_column_once_beside_the_first() -> None:
    header = ("method", *(f"c{n}" for n in range(9)), "note")
    rows = [("lora", *("1,234.5" for _ in range(9)), "a note of several words, that may fold")]
    table = Table("t", header, rows, prose=1, strong=frozenset({(0, 3)}))
    found = pieces(table, 40)
    assert [name for piece in found for name in piece.header[1:]] == list(header[1:])
    assert all(piece.header[0] == "method" for piece in found)
    marked = [piece.header[c] for piece in found for _, c in piece.strong]
    assert marked == ["c2"] and found[-1].is_words(len(found[-1].header) - 1)
    assert pieces(table, 200) == [table]
