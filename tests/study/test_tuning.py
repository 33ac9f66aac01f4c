"""Real trials: pruned, interrupted and resumed, and the runs that use their settings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_runs import Cli
from support.paths import REPO

from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.recipe.load_recipe import digest, with_settings
from sparsegrad_cli.recipe.study import LoadedStudy, load_study, make_study
from sparsegrad_cli.records.study import Trial
from sparsegrad_cli.study.engines import LocalEngine
from sparsegrad_cli.study.folder import StudyFolder, study_digest
from sparsegrad_cli.study.optuna_trials import Pruner, TrialStore, best_trial, ended_trial, propose
from sparsegrad_cli.study.runs import Runs
from sparsegrad_cli.study.search_space import RATE, series_of
from sparsegrad_cli.study.trial import StepLog, TrialRunner
from sparsegrad_cli.study.tuning import Tuning

STEPS = 24
TINY = (
    "task.train_limit=32",
    "task.eval_limit=16",
    "task.max_length=16",
    "train.per_device_train_batch_size=8",
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.logging_steps=1",
)


def prepared(folder: Path, study: LoadedStudy, scores: list[float]) -> None:
    """Write a comparison that was interrupted after trials with these constant scores."""
    assert study.study.tune is not None
    (folder / "cells").mkdir(parents=True)
    record = {"schema": 1, "digest": study_digest(study), "status": "interrupted", "cells": []}
    write_json_atomic(folder / "compare.json", record)
    store = TrialStore(folder / "tuning.journal")
    for series in series_of(study):
        store.open(series.name, series.about())
        for number, score in enumerate(scores):
            told = store.ended(series.name, 99)
            trial = Trial(
                number=number,
                settings=propose(series.space, told, series.name),
                status="done",
                metric="matthews_correlation",
                score=score,
                loss=1.0,
                seconds=1.0,
                steps=STEPS,
            )
            seen = dict.fromkeys(range(2, STEPS + 1, 2), score)
            store.add(series.name, ended_trial(series.space, trial, seen))


@pytest.mark.usefixtures("warm_python")
def test_a_trial_below_the_median_is_pruned_and_runs_use_the_best_settings(
    cli: Cli, tmp_path: Path, small_bert: str
) -> None:
    """The fourth trial is a real one, which cannot score 2 and is pruned. The third is the best."""
    over = (*TINY, f"model={small_bert}", f"train.max_steps={STEPS}")
    study = make_study(None, ("full",), 1, over, trials=4)
    prepared(tmp_path / "c", study, [2.0, 2.1, 2.5])
    command = ("--methods", "full", "--seeds", "1", "--tune", "4", "-o", "c", "-q")
    outcome = cli("compare", *command, *over)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    (series,) = record["tuning"]["series"]
    assert [trial["status"] for trial in series["trials"]] == ["done", "done", "done", "pruned"]
    pruned = series["trials"][3]
    assert pruned["settings"] == {RATE: 3.557e-05}  # the fourth of Halton's points
    assert pruned["score"] <= 1 and pruned["seconds"] > 0
    assert STEPS // 3 <= pruned["steps"] <= STEPS
    # Its record is kept, its weights are not.
    run = tmp_path / "c" / pruned["runs"][0]["run_dir"]
    kept = json.loads((run / "run.json").read_text())
    assert kept["seed"] == 101 and kept["status"] in ("pruned", "done")
    assert not list(run.glob("checkpoint-*")) and not (run / "adapter").exists()
    # The run used the best settings, which are the highest that were tried.
    assert series["best"]["number"] == 2 and series["best"]["settings"] == {RATE: 6.325e-4}
    assert series["edges"] == [{"key": RATE, "end": "highest"}]
    (cell,) = record["cells"]
    recipe = (tmp_path / "c" / cell["run_dir"] / "recipe.yaml").read_text()
    assert "learning_rate: 0.0006325" in recipe and "seed: 42" in recipe
    assert cell["run"]["metrics"]["history"][-1]["step"] == STEPS  # reported runs are never pruned
    flat = " ".join(outcome.out.split())
    assert "4 (1 pruned)" in flat and "may lie beyond" in flat
    assert "4 trials of tuning for every method on every task" in flat
    for name in ("report.html", "report.md", "report.tex"):
        text = (tmp_path / "c" / name).read_text()
        assert "4 (1 pruned)" in text and "may lie beyond" in text
    # Nothing is repeated. Another space, or none, is another comparison.
    again = cli("compare", *command, *over)
    assert again.code == 0
    after = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert after["tuning"] == record["tuning"] and after["cells"] == record["cells"]
    for others in (("--tune", "5"), ("--tune", "3", "train.weight_decay=0.1"), ()):
        refused = cli("compare", *command[:4], *others, "-o", "c", "-q", *over)
        assert refused.code == 2, refused.err


@pytest.mark.usefixtures("warm_python")
def test_every_seed_is_tuned_by_itself_and_its_best_trial_is_the_run(
    cli: Cli, tmp_path: Path, small_bert: str
) -> None:
    """Held-out rows choose the trial; the run is a copy of it, not trained again."""
    settings = {
        "task": {"train_limit": 32, "eval_limit": 16, "max_length": 16, "holdout": 24},
        "train": {"per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2},
        "model": small_bert,
    }
    settings["train"] |= {"max_steps": 4}  # type: ignore[operator]
    study = {
        "name": "own",
        "methods": ["full", "lora"],
        "seeds": [42, 1],
        "match": None,
        "settings": settings,
        "tune": {"trials": 2, "seeds": "own"},
        "test": {"over": "seeds_and_examples", "row": "lora", "margins": {"full": 0.05}},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(study))
    outcome = cli("compare", "own.yaml", "-o", "c", "-q")
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    tuning = record["tuning"]
    assert tuning["own_seeds"] and not tuning["seeds"]
    assert [(one["method"], one["seed"]) for one in tuning["series"]] == [
        ("full", 42),
        ("lora", 42),
        ("full", 1),
        ("lora", 1),
    ]
    rates = [[trial["settings"][RATE] for trial in one["trials"]] for one in tuning["series"]]
    assert len({rate for each in rates for rate in each}) == 8, "no two series try the same rates"
    # Both methods of a seed lie at the same places of their spans.
    low = [one["space"][0]["low"] for one in tuning["series"]]
    assert rates[0][0] / low[0] == pytest.approx(rates[1][0] / low[1], rel=1e-3)
    for one, cell in zip(tuning["series"], record["cells"], strict=True):
        best = one["trials"][one["best"]["number"]]
        folder = tmp_path / "c" / cell["run_dir"]
        source = tmp_path / "c" / best["runs"][0]["run_dir"]
        ours, theirs = (json.loads((each / "run.json").read_text()) for each in (folder, source))
        assert ours.pop("name") == folder.name and ours.pop("output_dir") == f"c/{cell['run_dir']}"
        assert ours.items() <= theirs.items()
        assert f"export c/{cell['run_dir']}" in (folder / "report.md").read_text()
        assert (folder / "adapter").is_dir() and not (source / "adapter").exists()
        assert cell["run"]["metrics"]["best"]["score"] == best["score"]
        assert f"output_dir: {folder}" in (folder / "recipe.yaml").read_text()
        assert cell["seed"] == cell["run"]["seed"] == one["seed"]
    (pair,) = record["tests"]["pairs"]
    assert (pair["a"], pair["b"], pair["margin"]) == ("lora", "full", 0.05)
    flat = " ".join(outcome.out.split())
    assert "for each seed by itself" in flat
    assert cli("compare", "own.yaml", "-o", "c", "-q").code == 0
    again = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert again["tuning"] == tuning and again["cells"] == record["cells"]
    assert cli("predict", "c", "a text").code == 0


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"tune": {"seeds": "own"}}, "tune.seeds"),
        ({"test": "seeds_and_examples"}, "test.over"),
        ({"test": {"row": "lara"}}, "test.row"),
        ({"test": {"margins": {"full": 0.1}}}, "test.margins"),
        (
            {"test": {"over": "seeds_and_examples", "row": "full", "margins": {"full": 0.1}}},
            "test.margins",
        ),
    ],
)
def test_tests_and_own_seeds_that_do_not_fit_are_refused(
    tmp_path: Path, keys: dict[str, Any], key: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"methods": ["full", "lora"], "match": None, **keys}))
    with pytest.raises(RecipeError) as refused:
        load_study(path)
    assert key in [problem.key for problem in refused.value.problems]


def test_a_study_tuned_by_an_earlier_version_is_refused(tmp_path: Path) -> None:
    study = make_study(None, ("full",), 1, TINY, trials=2)
    (tmp_path / "tuning.db").touch()
    tuning = Tuning(study, StudyFolder(tmp_path), Runs(LocalEngine(1)), print, lambda: None)
    for make in (False, True):
        with pytest.raises(UsageError, match="earlier version") as refused:
            tuning.open(make=make)
    assert refused.value.fix is not None and "--overwrite" in refused.value.fix


def test_rows_without_a_finished_trial_have_no_runs(tmp_path: Path) -> None:
    study = make_study(None, ("full", "lora"), 2, TINY, trials=2)
    prepared(tmp_path / "c", study, [0.5, 0.4])
    place = StudyFolder(tmp_path / "c")
    tuning = Tuning(study, place, Runs(LocalEngine(1)), print, lambda: None)
    assert tuning.open(make=False)
    full, lora = series_of(study)
    store = tuning.store
    store.forget(lora.name, lora.about())
    assert tuning.tuned() is None  # trials are missing
    for number in range(2):
        failed = Trial(number=number, settings={RATE: 1e-3}, status="failed", seconds=3.0)
        store.add(lora.name, ended_trial(lora.space, failed, {}))
    tuned = tuning.tuned()
    assert tuned is not None
    assert [(cell.label, cell.seed) for cell in tuned.cells] == [("full", 42), ("full", 3705)]
    for cell in tuned.cells:
        assert cell.loaded.recipe.train.learning_rate == full.space[0].centre
    block = tuning.block()
    assert [series.best is None for series in block.series] == [False, True]
    assert [series.seconds for series in block.series] == [2.0, 6.0]
    tuning.retry()  # a series without a finished trial starts again
    assert [len(series.trials) for series in tuning.block().series] == [2, 0]


def test_a_trial_averages_its_seeds_and_ends_at_the_first_pruned_one(
    tmp_path: Path,
) -> None:
    """Runs that outlived their coordinator are judged in the same way."""
    study = make_study(None, ("full",), 1, TINY, trials=4)
    (series,) = series_of(study)
    settings = {RATE: 1e-3}

    def ended(place: StudyFolder, number: int, seed: int, scores: list[float]) -> None:
        folder = place.trial(f"{series.name}-t{number}-s{seed}")
        (folder / "checkpoint-6").mkdir(parents=True)
        history = [{"step": 2 * at, "score": s, "loss": 1 - s} for at, s in enumerate(scores, 1)]
        lines = [json.dumps({"step": e["step"], "eval": e}) + "\n" for e in history]
        (folder / "steps.jsonl").write_text("".join(lines))
        run = {"schema": 1, "status": "done", "time": {"total_s": 5.0}, "seed": seed}
        run["recipe_digest"] = digest(with_settings(series.recipe, settings, seed))
        best = max(history, key=lambda e: e["score"])
        run |= {"metrics": {"best": best}, "task": {"metric": "accuracy"}}
        write_json_atomic(folder / "run.json", run)

    place, runs = StudyFolder(tmp_path), Runs(LocalEngine(1))
    store = TrialStore(tmp_path / "tuning.journal")
    store.open(series.name, replace(series, seeds=(7, 8)).about())
    curves = [([0.5, 0.6, 0.6], [0.4, 0.8, 0.7]), ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])]
    curves += [([0.6, 0.9, 0.9], [0.6, 0.9, 0.9]), ([0.1, 0.2, 0.9], [1.0, 1.0, 1.0])]
    trials = []
    for number, both in enumerate(curves):
        for seed, scores in zip((7, 8), both, strict=True):
            ended(place, number, seed, scores)
        told = store.ended(series.name, 9)
        runner = TrialRunner(series, number, settings, Pruner(told), store)
        trial = runner.run((7, 8), place, runs, lambda: None)
        assert trial is not None
        store.add(series.name, ended_trial(series.space, trial, runner.pruner.seen))
        trials.append(trial)
    first, *_, last = trials
    assert first.status == "done" and first.score == 0.7 and first.steps == 12
    assert first.loss == pytest.approx(0.3) and first.seconds == 10
    assert [run.score for run in first.runs] == [0.6, 0.8]
    assert first.runs[1].run_dir == "tuning/builtin-acceptability-full-t0-s8"
    # 0.1 and 0.2 are below the medians 0.5 and 0.6, so the second seed does not run.
    assert last.status == "pruned" and len(last.runs) == 1 and last.seconds == 5
    best = best_trial(trials)
    assert best is not None and best.number == 2


def test_step_log_reads_each_evaluation_once(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    assert list(log.evaluations()) == []

    def line(step: int, score: float | None = None) -> str:
        found: dict[str, Any] = {"step": step, "loss": 0.5}
        if score is not None:
            evaluation = {"step": step, "score": score, "loss": 1.0, "metric": "loss"}
            found = {"step": step, "eval": evaluation}
        return json.dumps(found) + "\n"

    def best() -> float | None:
        found = log.best()
        assert found is not None
        return found.score

    def read() -> list[int]:
        return [found.step for found in log.evaluations()]

    path.write_text(line(0, 0.1) + line(1) + line(2, 0.9)[:20])
    assert read() == [0] and log.last_step == 1
    path.write_text(line(0, 0.1) + line(1) + line(2, 0.9) + "{torn\n" + line(3))
    assert read() == [2] and read() == [] and log.last_step == 3
    assert best() == 0.9  # without the evaluation before training
    path.write_text(line(0, 0.1) + line(1))  # truncated, as by a resumed run
    assert read() == [0]
    with path.open("a") as file:
        file.write(line(4, 0.3) + line(6, 0.5))
    assert read() == [4, 6] and best() == 0.3  # a lower loss is better


def compare(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = ("compare", "--methods", "lora,full", "--seeds", "1", "--tune", "3", "-o")
    return subprocess.Popen(
        [sys.executable, "-m", "sparsegrad_cli", *command, str(folder), *TINY, *more],
        env=os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_an_interrupted_tuning_of_two_methods_resumes(tmp_path: Path) -> None:
    folder, over = tmp_path / "c", ("train.max_steps=4",)
    first = compare(folder, *over)
    second = folder / "tuning" / "builtin-acceptability-lora-t1-s101" / "steps.jsonl"
    deadline = time.monotonic() + 600
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=600)[1]
    assert first.returncode == 130, told
    stopped = json.loads((folder / "compare.json").read_text())
    assert stopped["status"] == "interrupted"
    assert [len(s["trials"]) for s in stopped["tuning"]["series"]] == [1, 0]
    again = compare(folder, *over, "--jobs", "2")
    more = again.communicate(timeout=1800)[1]
    assert again.returncode == 0, more
    begun = re.findall(r"^\S+  (\S+)  trial (\d) of 3: learning_rate", more, re.MULTILINE)
    assert sorted(begun) == sorted([("lora", n) for n in "23"] + [("full", n) for n in "123"])
    record = json.loads((folder / "compare.json").read_text())
    assert record["status"] == "done"
    study = make_study(None, ("lora", "full"), 1, (*TINY, *over), trials=3)
    assert record["digest"] == study_digest(study)
    for series, asked in zip(record["tuning"]["series"], series_of(study), strict=True):
        trials = [Trial.model_validate(trial) for trial in series["trials"]]
        assert len(trials) == record["tuning"]["trials"] == 3
        assert all(trial.status == "done" for trial in trials)
        assert all((trial.seconds or 0) > 0 and trial.steps == 4 for trial in trials)
        # Interruption does not change the proposals.
        told_so_far: list[Any] = []
        for trial in trials:
            assert propose(asked.space, told_so_far, asked.name) == trial.settings
            told_so_far.append(ended_trial(asked.space, trial, {}))
        best = best_trial(trials)
        assert best is not None and series["best"]["number"] == best.number
    rates = {s["method"]: s["best"]["settings"][RATE] for s in record["tuning"]["series"]}
    store = StudyFolder(folder)
    tuning = Tuning(study, store, Runs(LocalEngine(1)), print, lambda: None)
    tuning.open(make=False)
    tuned = tuning.tuned()
    assert tuned is not None
    for cell, ran in zip(tuned.cells, record["cells"], strict=True):
        assert cell.loaded.recipe.train.learning_rate == rates[cell.label]
        assert ran["run"]["recipe_digest"] == digest(cell.loaded.recipe)
        assert ran["run"]["seed"] not in record["tuning"]["seeds"]
    assert record["parity"]["declared"][0]["values"] == rates
