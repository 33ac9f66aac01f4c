"""The tables of docs/explanation/scaling.md are those of the saved simulation."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from benchmarks.scaling import METHODS, MODELS, PROCESSES, simulate, with_tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
}


def test_the_page_has_the_tables_of_the_record() -> None:
    rows = json.loads((DOCS / "results" / "scaling.json").read_text())["rows"]
    page = (DOCS / "explanation" / "scaling.md").read_text()
    assert with_tables(page, rows) == page
    found = {(row["model"], row["processes"], row["method"]) for row in rows}
    assert set(product(MODELS, PROCESSES, METHODS["fsdp2"])) <= found


@pytest.mark.slow
def test_every_block_adds_the_same_bytes(tmp_path: Path) -> None:
    """So that models of 3 and 4 blocks say what one of 80 needs."""
    found = []
    for blocks in (3, 4, 6):
        folder = tmp_path / str(blocks)
        folder.mkdir()
        config = LLAMA | {"num_hidden_layers": blocks}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        found.append(simulate(folder, "fsdp2", 8))
    for method in METHODS["fsdp2"]:
        three, four, six = (figures[method] for figures in found)
        for key, size in six.items():
            assert size == pytest.approx(three[key] + 3 * (four[key] - three[key]), rel=0.01), key
