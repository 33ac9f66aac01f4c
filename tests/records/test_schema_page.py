"""The generated reference page of the records, and its examples."""

from __future__ import annotations

import json

import pytest
from support.paths import REPO

from sparsegrad_cli.records.answers import AnswersRecord
from sparsegrad_cli.records.base import Record
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.schema_page import page
from sparsegrad_cli.records.study import StudyRecord

REFERENCE = REPO / "docs" / "reference"


def test_the_page_on_disk_is_up_to_date() -> None:
    assert (REFERENCE / "records.md").read_text(encoding="utf-8") == page(), "run `make schema`"


@pytest.mark.parametrize(
    ("name", "model"), [("run", RunRecord), ("compare", StudyRecord), ("answers", AnswersRecord)]
)
def test_the_examples_are_valid_records(name: str, model: type[Record]) -> None:
    example = json.loads((REFERENCE / f"{name}.example.json").read_text(encoding="utf-8"))
    assert model.model_validate(example, extra="forbid").to_json() == example
