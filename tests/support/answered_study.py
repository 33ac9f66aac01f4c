"""A finished comparison of tiny chat models, and records of their answers to questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.chat_models import chat_model_folder
from support.cli_runs import METHODS
from support.small_runs import record, train

QUESTIONS = ("Is 12 more?", "And 7?", "Who came home?", "What was old?")
ANSWERS = ("It is, by 5.", "No.", "The ship.")
CELLS = (("lora", 1), ("core", 1), ("lora", 2))


def make_answered_study(place: Path, cells: Sequence[tuple[str, int]] = CELLS) -> Path:
    """Make ``place/study``, as `sparsegrad compare` leaves it, with one failed run.

    The base model of the runs is in ``place/base``.
    """
    base, study, data = (
        chat_model_folder(place / "base", positions=128),
        place / "study",
        place / "d.jsonl",
    )
    rows = [{"prompt": f"{n}. {QUESTIONS[n % 4]}", "completion": ANSWERS[n % 3]} for n in range(32)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, seed in cells:
        method = ("method.rank=8",) if name == "core" else METHODS[name]
        task = ("task.max_length=64", "train.learning_rate=5e-2", f"seed={seed}")
        run = train(study / "cells" / f"chat-{name}-s{seed}", base, data, *task, *method)
        found.append(cell_entry(name, seed, record(run)))
    failed = {"what": "memory ran out", "where": None, "fix": None, "title": "x"}
    last = {
        **cell_entry("full", 1, {**found[0]["run"], "status": "out_of_memory"}),
        "error": failed,
    }
    methods = [*dict.fromkeys(name for name, _ in cells), "full"]
    compare = {"schema": 1, "name": "s", "status": "failed", "tasks": ["chat"], "methods": methods}
    compare |= {"seeds": [1, 2], "cells": [*found, last], "rows": [], "checks": [], "figures": []}
    (study / "compare.json").write_text(json.dumps(compare))
    return study


def cell_entry(method: str, seed: int, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": "chat",
        "method": method,
        "seed": seed,
        "run_dir": f"cells/chat-{method}-s{seed}",
        "status": run["status"],
        "error": None,
        "run": run,
    }


def answers_record(answers: dict[str, list[list[str]]], **more: Any) -> dict[str, Any]:
    """Return a record for answers/ from ``{"lora 1": [[answer to each turn] for each question]}``.

    The key ``base`` stands for the base model.
    """
    turns = max((len(q) for said in answers.values() for q in said), default=1)
    count = max((len(said) for said in answers.values()), default=0)
    asked = [
        {"question_id": n, "category": "math", "turns": [f"q{n}.{t}" for t in range(turns)]}
        for n in range(count)
    ]
    columns = []
    for name, said in answers.items():
        method, _, seed = name.partition(" ")
        own = {"task": "chat", "method": method, "seed": int(seed or 0), "run_dir": name}
        base = {"task": None, "method": None, "seed": None, "tasks": ["chat"], "model": "tiny"}
        lines = [
            {"question_id": n, "answers": list(texts), "stopped": ["end"] * len(texts)}
            for n, texts in enumerate(said)
        ]
        found = base if name == "base" else own
        columns.append({**found, "status": "done", "asked": len(lines), "answers": lines})
    settings = {"temperature": 0.0, "max_new_tokens": 9}
    return {
        "schema": 1,
        "status": "done",
        "questions": "q.jsonl",
        "settings": settings,
        "asked": asked,
        "columns": columns,
        **more,
    }


def save_answers(study: Path, made: dict[str, Any], name: str = "q") -> Path:
    """Write the record where reports look for it, and return its path."""
    path = study / "answers" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))
    return path
