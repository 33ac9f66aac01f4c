"""The generated pages of the reference are current, and the examples of records are valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.paths import REPO

from docs.generate.pages import PAGES
from sparsegrad_cli.records.answers import AnswersRecord
from sparsegrad_cli.records.base import Record
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import StudyRecord

REFERENCE = REPO / "docs" / "reference"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_page_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run `make reference`"


@pytest.mark.parametrize(
    ("name", "model"), [("run", RunRecord), ("compare", StudyRecord), ("answers", AnswersRecord)]
)
def test_the_examples_are_valid_records(name: str, model: type[Record]) -> None:
    example = json.loads((REFERENCE / f"{name}.example.json").read_text(encoding="utf-8"))
    assert model.model_validate(example, extra="forbid").to_json() == example
