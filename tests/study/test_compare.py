"""Drive ``sparsegrad compare``: equal conditions, continuation, and failed runs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.cli_runs import SMALL, Cli

pytestmark = pytest.mark.usefixtures("warm_python")


@pytest.fixture
def quick(small_bert: str) -> tuple[str, ...]:
    return (
        f"model={small_bert}",
        *SMALL,
        "train.max_steps=3",
        "train.eval_steps=3",
        "train.logging_steps=1",
    )


@contextmanager
def watched(page: Path) -> Iterator[list[tuple[int, bool]]]:
    """Yield (runs done, whether the page reloads itself) of every version of a page."""
    seen: list[tuple[int, bool]] = []
    over = threading.Event()

    def look() -> None:
        while True:
            last = over.is_set()
            if page.is_file():
                text = page.read_text(encoding="utf-8")
                assert text.endswith("</html>\n")  # complete at every moment
                done = re.search(r"(\d+) of 2 runs done", text)
                assert done is not None
                found = (int(done[1]), 'http-equiv="refresh"' in text)
                if seen[-1:] != [found]:
                    seen.append(found)
            if last:
                return
            over.wait(0.02)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(look)
        try:
            yield seen
        finally:
            over.set()
        watching.result()


def test_comparison_is_fair_complete_and_can_be_extended(
    cli: Cli, tmp_path: Path, quick: tuple[str, ...]
) -> None:
    command = ("compare", "--methods", "lora,meprop", "--seeds", "1", "-o", "c", "-q", *quick)
    with watched(tmp_path / "c" / "report.html") as seen:
        outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    # The page exists from the first run on and reloads itself until the end. The page between the
    # last run and the end exists too briefly to be seen every time.
    assert [state for state in seen if state != (2, True)] == [(0, True), (1, True), (2, False)]
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert record["status"] == "done"
    assert [row["method"] for row in record["rows"]] == ["lora", "meprop"]
    (check,) = record["checks"]
    assert check["same_order"] and check["same_head_init"] and check["same_data"]
    assert check["same_model"] and check["same_precision"] and check["same_code"]
    assert check["steps_compared"] == 3
    parity = record["parity"]
    assert parity["compared"] > 40 and parity["declared"] == parity["flagged"] == []
    assert record["tests"]["pairs"] == [] and record["tests"]["untested"] == 1
    lora, meprop = record["rows"]
    assert lora["touched_targets"] == lora["trainable_targets"]
    assert meprop["touched_targets"] > meprop["trainable_targets"]  # it chooses again in every step
    asked = record["cells"][0]["run"]["counts"]["requested_target_entries"]
    assert record["cells"][1]["run"]["counts"]["requested_target_entries"] == asked
    assert (tmp_path / "c" / "report.html").stat().st_size > 10_000
    assert "http-equiv" not in (tmp_path / "c" / "report.html").read_text()
    for name in ("report.md", "report.tex"):
        text = (tmp_path / "c" / name).read_text()
        assert "with one seed, no method is ranked" in text and "lora" in text
    # Only a lost run is repeated.
    before = {c["run_dir"]: c["run"]["finished"] for c in record["cells"]}
    (tmp_path / "c" / record["cells"][1]["run_dir"] / "run.json").unlink()
    assert cli(*command).code == 0
    after = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert after["status"] == "done"
    assert after["cells"][0]["run"]["finished"] == before[after["cells"][0]["run_dir"]]
    # Another comparison does not overwrite it.
    for others in (
        ("--methods", "full", *quick),
        ("--methods", "lora,meprop", *quick, "task.max_length=19"),
    ):
        other = cli("compare", "--seeds", "1", "-o", "c", "-q", *others)
        assert other.code == 2 and "another study" in other.flat
        assert "acceptability lora seed" in other.flat
    # But the comparison may grow.
    assert cli("compare", "--methods", "meprop,full,lora", *command[3:]).code == 0
    grown = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [row["method"] for row in grown["rows"]] == ["meprop", "full", "lora"]
    kept = {c["run_dir"]: c["run"]["finished"] for c in grown["cells"]}
    assert all(kept[c["run_dir"]] == c["run"]["finished"] for c in after["cells"])


def test_a_failed_run_is_reported_in_its_row(
    cli: Cli, tmp_path: Path, quick: tuple[str, ...]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "name: s\n"
        "methods:\n"
        "  - {label: wild, method: full, train: {learning_rate: 1e+30}}\n"
        # Rates told apart by what comes after a dot, as the names of files end.
        "  - {method: full, learning_rates: [2.5e-4, 2.25e-4]}\n"
        "seeds: [1]\n",
        encoding="utf-8",
    )
    outcome = cli("compare", str(study), "-o", "c", "-q", *quick)
    assert outcome.code == 1, outcome.err
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert [row["status"] for row in rows.values()] == ["failed", "done", "done"]
    assert "diverged" in rows["wild"]["note"] or "finite" in rows["wild"]["note"]
    assert record["status"] == "failed"
    recipes = sorted((tmp_path / "c" / "cells").glob("*.yaml"))
    assert len(recipes) == 3
    assert all((recipe.parent / recipe.name.removesuffix(".yaml")).is_dir() for recipe in recipes)
