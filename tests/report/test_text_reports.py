"""Terminal and Markdown reports: equal numbers, line width, and escaped text."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from support.record_samples import compare_record, run_of, run_record, study_of

from sparsegrad_cli.cli.output import show
from sparsegrad_cli.report.document import Command, Commands, Document, Table
from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document, run_screen
from sparsegrad_cli.report.study import study_document, study_screen
from sparsegrad_cli.report.terminal import cut_to_width, screen


def shown(document: Document, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(screen(document))
    return capture.get()


def study_shown(record: dict[str, Any], width: int = 80) -> str:
    return shown(study_screen(study_of(record)), width)


def study_markdown(record: dict[str, Any]) -> str:
    return render(study_document(study_of(record)), "md")


def test_a_run_fits_a_terminal() -> None:
    text = shown(run_screen(run_of(run_record())))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for figure in ("61.0", "219,554", "6.2 steps/s", "backward", "evaluate 5.0 s"):
        assert figure in text


def test_a_finished_run_says_how_to_use_it() -> None:
    classifier = run_record() | {"output_dir": "runs/my film"}
    chat = classifier | {"task": {"name": "chat", "kind": "chat"}}
    stopped = classifier | {"status": "interrupted"}
    lines = shown(run_screen(run_of(classifier)), 200).splitlines()
    assert [line.split("  ")[1] for line in lines[-3:]] == [
        "sparsegrad predict 'runs/my film' 'a text'",
        "sparsegrad export 'runs/my film' --to merged",
        'pipeline("text-classification", model="runs/my film/export-merged")',
    ]
    text = shown(run_screen(run_of(chat)), 200)
    assert "sparsegrad generate 'runs/my film'" in text
    assert 'pipeline("text-generation", model="runs/my film/export-merged")' in text
    assert "pipeline(" not in shown(run_screen(run_of(stopped)), 200)
    for run in (classifier, chat):
        page = render(run_document(run_of(run)), "md")
        assert page.count("export-merged") == 1 and "pipeline(" in page


def test_a_calibration_shows_its_cost_and_energy() -> None:
    text = shown(run_screen(run_of(run_record() | {"command": "calibrate"})))
    for figure in ("5.0 s", "original", "38.0", "80.0", "intermediate.dense"):
        assert figure in text


def test_a_study_shows_scores_failures_and_checks() -> None:
    text = study_shown(compare_record())
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


def test_a_failed_check_is_marked() -> None:
    record = compare_record()
    record["checks"][0]["same_order"] = False
    sentence = "methods did NOT have the same order"
    assert sentence in study_shown(record)
    assert f"- **NO**: builtin:acceptability, seed 42: {sentence}" in study_markdown(record)


def cells_by_line(markdown: str) -> set[int]:
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    return {line.replace(r"\|", "").count("|") for line in rows}


@pytest.mark.parametrize("name", ["[bold red]x[/]", "a|b", "<b>x</b>", "`x`"])
def test_markup_in_names_is_escaped(name: str) -> None:
    record = compare_record()
    record["rows"][1]["method"] = name
    assert name in study_shown(record)
    markdown = study_markdown(record)
    assert "<b>" not in markdown
    assert cells_by_line(markdown) == cells_by_line(study_markdown(compare_record()))


def test_markdown_has_the_numbers_of_the_terminal() -> None:
    run = render(run_document(run_of(run_record())), "md")
    for figure in ("61.0", "219,554", "6.2 steps/s", "38.0"):
        assert figure in run
    study = study_markdown(compare_record())
    for figure in ("65.5 ± 1.2", "out of memory", "3 of 4 runs done", "61.2 ± 1.0"):
        assert figure in study


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_numbers_are_never_shortened_on_a_narrow_terminal(width: int) -> None:
    record = compare_record()
    mib = 2**20
    for row in record["rows"]:
        row |= {"trainable": 17_694_720, "peak_bytes": int(1_586.4 * mib), "train_s": 8_765.4}
        row |= {"beyond_weights_bytes": int(1_140.8 * mib), "adapter_bytes": int(67.5 * mib)}
    text = study_shown(record, width)
    tables = [line for line in text.splitlines() if "1,586.4" in line or "1,140.8" in line]
    assert tables and all(len(line) <= width for line in tables)
    assert "…" not in text
    for figure in ("17,694,720", "1,586.4", "1,140.8", "67.5"):
        assert text.count(figure) >= len(record["rows"]), figure


def test_a_cut_table_repeats_the_first_column_and_has_every_other_once() -> None:
    header = ("method", *(f"c{n}" for n in range(9)), "note")
    rows = [("lora", *("1,234.5" for _ in range(9)), "a note of several words, that may fold")]
    words = (True, *(False for _ in range(9)), True)
    table = Table("t", header, rows, words, strong=frozenset({(0, 3)}))
    parts = cut_to_width(table, 40)
    assert [name for part in parts for name in part.header[1:]] == list(header[1:])
    assert all(part.header[0] == "method" for part in parts)
    assert [part.header[c] for part in parts for _, c in part.strong] == ["c2"]
    assert parts[-1].words[-1]
    assert cut_to_width(table, 200) == [table]


def test_lines_to_copy_are_not_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = f'AutoModel.from_pretrained("/{"a" * 90}/{"b" * 90}")'
    document = Document(title="t", status="done", lead=[Commands([Command(line, "load")])])
    show({}, document, as_json=False)
    assert f"load  {line}\n" in capsys.readouterr().out
