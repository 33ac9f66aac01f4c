"""MiniLM is trained and exported by the commands, and used after the run is deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import METHODS, SMALL, Cli
from support.small_runs import by_transformers

import sparsegrad_cli
from sparsegrad_cli.models.pretrained import locate

TEXTS = ["The keys to the cabinet is on the table.", "Nobody has ever seen them.", "A cat the sat."]


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found: torch.Tensor = model.eval()(**inputs).logits
    return found


def test_minilm_is_trained_exported_and_used(cli: Cli, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer, pipeline

    assert cli("train", *METHODS["core"], *SMALL, "train.learning_rate=1e-2", "-o", "run").code == 0
    outcome = cli("export", "run", "--to", "merged")
    assert outcome.code == 0, outcome.err
    # A table on stdout, progress on stderr.
    assert "Logits differ by" in outcome.out and "32 of 32" in outcome.out
    assert "export-merged" in outcome.out and "check" in outcome.err
    quiet = cli("export", "run", "--to", "lora", "--json")
    assert quiet.code == 0 and quiet.err == ""
    said = json.loads(quiet.out)
    assert said["check"]["difference"] < 1e-5 < said["check"]["largest_logit"]
    assert {row["rank"] for row in said["targets"]} == {64} and said["modules"] == ["classifier"]
    assert cli("export", "run", "--to", "adapter", "-q").code == 0
    size = (tmp_path / "run" / "export-adapter" / "adapter.safetensors").stat().st_size
    assert size < 2 * 2**20, "two shared bases of 64 directions, 1 % of the entries, the head"

    forms = tmp_path / "elsewhere"
    for form in ("merged", "lora", "adapter"):
        shutil.move(tmp_path / "run" / f"export-{form}", forms / form)
    shutil.rmtree(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(forms / "merged")
    merged = by_transformers(forms / "merged")
    expected = logits(merged, tokenizer)
    base: Any = by_transformers(locate("builtin:minilm"), num_labels=2)
    assert float((logits(base, tokenizer) - expected).abs().max()) > 1e-2
    lora = PeftModel.from_pretrained(base, str(forms / "lora"))
    for model in (lora, sparsegrad_cli.load_adapter(forms / "adapter")):
        torch.testing.assert_close(logits(model, tokenizer), expected, atol=1e-5, rtol=0)
    plain = lora.merge_and_unload()
    torch.testing.assert_close(logits(plain, tokenizer), expected, atol=1e-5, rtol=0)
    named = pipeline("text-classification", model=merged, tokenizer=tokenizer)(TEXTS)
    labels = [["unacceptable", "acceptable"][row] for row in expected.argmax(1).tolist()]
    assert [answer["label"] for answer in named] == labels
    assert [answer["score"] for answer in named] == pytest.approx(
        expected.softmax(1).amax(1).tolist(), abs=1e-4
    )
