"""Tuning in reports: best settings, values at the end of a range, and equal effort."""

from __future__ import annotations

import copy
from typing import Any

from support.record_samples import compare_record, study_of

from sparsegrad_cli.records.study import Trial
from sparsegrad_cli.report.conclusions import check_lines
from sparsegrad_cli.report.tuning import (
    outcome_words,
    settings_words,
    trials_table,
    tuning_check,
    tuning_lines,
    tuning_progress,
    tuning_table,
)


def record() -> dict[str, Any]:
    """Return the documented record with two complete series of two trials."""
    made = compare_record()
    tuning = made["tuning"]
    tuning["trials"] = 2
    (lora,) = tuning["series"]
    second = lora["trials"][0] | {"number": 1, "status": "pruned", "score": 0.31, "steps": 90}
    lora["trials"].append(second | {"settings": {"train.learning_rate": 6.325e-4}})
    core = copy.deepcopy(lora) | {"method": "sparsegrad", "edges": []}
    core["trials"][1] |= {"status": "failed", "score": None, "loss": None, "error": "it diverged"}
    tuning["series"].append(core)
    return made


def test_settings_and_outcomes_in_words() -> None:
    settings = {"train.learning_rate": 6.325e-4, "train.lr_scheduler_type": "cosine"}
    assert settings_words(settings) == "learning_rate 0.0006325, lr_scheduler_type cosine"
    assert settings_words({"train.warmup_steps": 0, "x": None}) == "warmup_steps 0, x not recorded"
    accuracy = Trial(number=0, settings={}, status="done", metric="accuracy", score=0.612)
    assert outcome_words(accuracy) == "score ×100 61.2"
    pruned = outcome_words(accuracy.changed(status="pruned"))
    assert pruned == "pruned, score ×100 61.2 so far"
    assert outcome_words(accuracy.changed(metric="loss", score=1.5)) == "validation loss 1.500"
    failed = accuracy.changed(status="out_of_memory", error="it ran out", score=None)
    assert outcome_words(failed) == "out of memory: it ran out"


def test_the_table_shows_best_settings_space_trials_and_values_at_the_end_of_a_range() -> None:
    table = tuning_table(study_of(record()))
    assert table is not None
    lora, core = table.rows
    assert lora == (
        *("lora", "learning_rate 0.002", "0.0002 and 0.02"),
        *("2 (1 pruned)", "58.0", "13 min 20 s"),
    )
    assert core[3] == "2 (1 failed)"
    (edge,) = tuning_lines(study_of(record()))
    assert edge.startswith("lora: the best learning_rate is the lowest that was tried")
    assert edge in table.notes
    trials = trials_table(study_of(record()))
    assert trials is not None and len(trials.rows) == 4
    assert trials.strong == {(0, 3), (0, 5), (2, 3), (2, 5)}
    assert trials.rows[1][4:6] == ("pruned", "31.0") and trials.rows[3][4] == "it diverged"


def test_warnings_name_the_task_if_there_are_several() -> None:
    several = record() | {"tasks": ["builtin:acceptability", "glue/rte"]}
    table = tuning_table(study_of(several))
    assert table is not None and table.header[0] == "task"
    assert tuning_lines(study_of(several))[0].startswith("builtin:acceptability, lora: ")
    choices = {"key": "train.lr_scheduler_type", "choices": ["linear", "cosine"]}
    several["tuning"]["series"][0]["space"].append(choices)
    table = tuning_table(study_of(several))
    assert table is not None
    assert table.rows[0][3] == "0.0002 and 0.02; lr_scheduler_type linear, cosine"


def test_unequal_numbers_of_trials_are_reported_as_unfinished() -> None:
    whole = record()
    assert tuning_check(study_of(whole)) == check_lines(study_of(whole))[-1]
    assert tuning_check(study_of(whole)) == (
        True,
        "2 trials of tuning for every method on every task, over equally wide spaces, on seeds "
        "that are not reported (101).",
    )
    assert tuning_progress(study_of(whole)) == ""
    whole["tuning"]["series"][1]["trials"].pop()
    held, line = tuning_check(study_of(whole)) or (None, "")
    assert held is None and "not done yet" in line
    assert tuning_progress(study_of(whole)) == "3 of 4 trials of tuning"
    for none in ({}, {"tuning": None}, {"tuning": {"trials": 0}}):
        assert tuning_table(study_of(none)) is None and trials_table(study_of(none)) is None
        assert tuning_lines(study_of(none)) == [] and tuning_progress(study_of(none)) == ""
    assert tuning_check(study_of({})) is None


def test_a_row_without_settings_gives_the_reason() -> None:
    broken = record()
    core = broken["tuning"]["series"][1]
    for trial in core["trials"]:
        trial["status"] = "failed"
    core["best"] = None
    assert any("sparsegrad: every trial failed" in line for line in tuning_lines(study_of(broken)))
