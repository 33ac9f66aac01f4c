"""Chat tasks from recipe to report, with a tiny LLaMA of random weights and a real tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.chat_tokenizers import byte_level
from support.cli_runs import METHODS, Cli
from transformers import LlamaConfig, LlamaForCausalLM

QUESTIONS = ("Is 12 more than 7?", "And 7?", "Who came home?", "What was old?", "Nobody?")
ANSWERS = ("It is, by 5.", "No: they are equal.", "The children were asleep.", "The ship.")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A folder with a LLaMA of two blocks and its tokenizer."""
    folder = tmp_path / "llama"
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def talk(tmp_path: Path) -> str:
    """Write forty conversations; every question has its own answer."""
    path = tmp_path / "talk.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(40):
            asked = f"{number}. {QUESTIONS[number % len(QUESTIONS)]}"
            row = {"prompt": asked, "completion": ANSWERS[number % len(ANSWERS)]}
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture
def settings(llama: str, talk: str) -> tuple[str, ...]:
    """Return the settings of a run that takes seconds."""
    return (
        f"model={llama}",
        f"task={{name: chat, path: {talk}, max_length: 96, validation_fraction: 0.25}}",
        "train.per_device_train_batch_size=4",
        "train.max_steps=8",
        "train.eval_strategy=steps",
        "train.eval_steps=4",
        "train.logging_steps=2",
        "train.learning_rate=1e-2",
        "calibration.steps=3",
        "calibration.energy_steps=1",
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_to_answer(cli: Cli, settings: tuple[str, ...], name: str) -> None:
    method = ("method.rank=8",) if name == "core" else METHODS[name]
    outcome = cli("train", *settings, *method, "-o", "run", "--json")
    assert outcome.code == 0, outcome.err
    run: dict[str, Any] = json.loads(outcome.out)
    task, metrics = run["task"], run["metrics"]
    assert (task["kind"], task["metric"], task["majority_score"]) == ("chat", "loss", None)
    assert task["counts"]["training: labelled tokens"] > 0
    assert task["train_examples"] + task["validation_examples"]["validation"] == 40
    assert metrics["best"]["score"] == min(e["score"] for e in metrics["history"])
    assert metrics["best"]["score"] < metrics["initial"]["score"]
    values = metrics["best"]["values"]["validation"]
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert 0 <= values["token_accuracy"] <= 1
    assert run["counts"]["trainable_head"] == 0
    assert "Perplexity" in Path("run/report.html").read_text(encoding="utf-8")


def test_float32_targets_in_a_half_precision_model_are_evaluated_too(
    cli: Cli, settings: tuple[str, ...]
) -> None:
    """Products of the two dtypes need autocast in training and in every evaluation."""
    mixed = ("model.dtype=bfloat16", "train.bf16=true", "train.use_cpu=true")
    outcome = cli("train", *settings, *mixed, "method=full", "-o", "run", "--json")
    assert outcome.code == 0, outcome.err
    metrics = json.loads(outcome.out)["metrics"]
    assert metrics["final"]["score"] < metrics["initial"]["score"] < 8


@pytest.mark.parametrize("name", ["lora", "core"])
def test_eight_micro_batches_of_one_are_one_batch_of_eight(
    cli: Cli, settings: tuple[str, ...], name: str
) -> None:
    """Every labelled token of a step has the same weight, for any number of micro-batches."""
    method = ("method.rank=8",) if name == "core" else METHODS[name]
    adapters, losses = [], []
    for size, cut in ((8, 1), (1, 8), (2, 4)):
        # The bases are calibrated on the same batches, whatever the cut.
        batches = (
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={cut}",
            "calibration.batch_size=4",
            "train.max_steps=3",
            "train.eval_strategy=no",
            "train.eval_steps=null",
            "train.logging_steps=1",
        )
        outcome = cli("train", *settings, *method, *batches, "-o", f"r{size}", "--json")
        assert outcome.code == 0, outcome.err
        adapters.append(load_file(adapter_path(Path(f"r{size}"))))
        losses.append([entry["loss"] for entry in json.loads(outcome.out)["metrics"]["train"]])
    for other, logged in zip(adapters[1:], losses[1:], strict=True):
        assert other.keys() == adapters[0].keys()
        assert logged == pytest.approx(losses[0], rel=1e-4)
        for key, value in adapters[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=2e-5)


def test_validation_does_not_depend_on_packing(cli: Cli, settings: tuple[str, ...]) -> None:
    found = {}
    for packing in ("none", "pack", "concatenate"):
        outcome = cli(
            "train",
            *settings,
            "method=full",
            f"task.chat.packing={packing}",
            "-o",
            packing,
            "--json",
        )
        assert outcome.code == 0, outcome.err
        found[packing] = json.loads(outcome.out)
    initial = {name: run["metrics"]["initial"]["loss"] for name, run in found.items()}
    assert len(set(initial.values())) == 1
    rows = {name: run["task"]["train_examples"] for name, run in found.items()}
    assert rows["pack"] < rows["none"] and rows["concatenate"] < rows["none"]


def test_forgetting_is_measured_on_plain_text(
    cli: Cli, settings: tuple[str, ...], tmp_path: Path
) -> None:
    text = tmp_path / "known.txt"
    text.write_text("The old ship came home, and nobody had seen it. " * 20, encoding="utf-8")
    plain = cli("train", *settings, "method=full", "-o", "plain", "--json")
    outcome = cli(
        "train", *settings, "method=full", f"task.chat.forgetting={text}", "-o", "run", "--json"
    )
    assert outcome.code == 0, outcome.err
    before, after = (json.loads(o.out)["metrics"] for o in (plain, outcome))
    for when in ("initial", "best"):
        assert after[when]["values"]["plain text"]["loss"] > 0
        # It selects nothing and changes nothing.
        assert after[when]["score"] == before[when]["score"]
    assert "plain text" in Path("run/report.html").read_text(encoding="utf-8")


def test_the_best_evaluation_has_a_checkpoint(cli: Cli, settings: tuple[str, ...]) -> None:
    """If training improves nothing, the record still describes a model that was saved."""
    outcome = cli(
        "train", *settings, "method=full", "train.learning_rate=1e-30", "-o", "run", "--json"
    )
    assert outcome.code == 0, outcome.err
    metrics = json.loads(outcome.out)["metrics"]
    assert metrics["best"]["score"] == metrics["initial"]["score"]
    assert metrics["best"]["step"] == 4
    assert Path("run/checkpoint-4").is_dir()


@pytest.mark.usefixtures("warm_python")
def test_methods_are_compared_by_loss(cli: Cli, settings: tuple[str, ...]) -> None:
    outcome = cli("compare", "--methods", "full,lora", "--seeds", "2", "-o", "c", "-q", *settings)
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("c/compare.json").read_text())
    rows = {row["method"]: row["score_mean"] for row in record["rows"]}
    best = min(rows, key=lambda name: rows[name])
    report = Path("c/report.md").read_text(encoding="utf-8")
    assert "validation loss" in report and "×100" not in report
    assert f"**{rows[best]:.3f}" in report
    assert all(check["same_order"] and check["same_data"] for check in record["checks"])


def test_a_run_notes_masked_answers_and_parts_that_the_template_leaves_out(
    cli: Cli, settings: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "agent.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(20):
            messages = [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": "bad", "train": False},
                {"role": "user", "content": "And 7?"},
                {"role": "assistant", "content": "ok", "reasoning": "why"},
            ]
            file.write(json.dumps({"messages": messages, "source": "made up"}) + "\n")
    overrides = ("method=full", f"task.path={path}", "train.max_steps=1")
    outcome = cli("train", *settings, *overrides, "-o", "run")
    assert outcome.code == 0, outcome.err
    task = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["task"]
    lost = "the chat template leaves out reasoning to be learnt: 20 x; first:"
    for note in ("keys that are not used: source (20 rows)", lost):
        assert note in outcome.flat and any(note in found for found in task["notes"])
    counts = task["counts"]
    assert counts["answers with a loss weight of 0, not learnt"] == 20
    # Two letters and the end of the turn.
    labelled = [counts[f"{part}: labelled tokens"] for part in ("training", "validation")]
    assert sum(labelled) == 20 * 3


def test_conversations_that_max_length_cuts_or_drops_are_noted(
    cli: Cli, settings: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    rows = [("And 7?", "No."), ("word " * 200, "never reached"), ("And 9?", "word " * 200)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(30):
            asked, answer = rows[number % len(rows)]
            row = {"prompt": f"{number} {asked}", "completion": answer}
            file.write(json.dumps(row) + "\n")
    overrides = ("method=full", f"task.path={path}", "train.max_steps=1")
    outcome = cli("train", *settings, *overrides, "-o", "run")
    assert outcome.code == 0, outcome.err
    task = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["task"]
    for part in ("training", "validation"):
        cut = task["counts"][f"{part}: cut to max_length"]
        dropped = task["counts"][f"{part}: dropped, nothing to learn within max_length"]
        note = f"{part} conversations longer than max_length 96: {cut} cut, {dropped} dropped"
        assert cut and dropped
        assert note in outcome.flat and any(note in found for found in task["notes"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("task.path=null",), "task.path"),
        (("task.chat.train_on=last",), "task.chat.train_on"),
        (("task={name: glue/rte, chat: {paths: best}}",), "task.chat"),
        (("train.label_smoothing_factor=0.1",), "label smoothing"),
        (("task.metric=accuracy",), "not a metric of conversations"),
        (("task.chat.paths=best",), "not to chat"),
        (("task.chat.packing=tight",), "task.chat.packing"),
        (("task.chat.forgetting=gone.txt",), "no such file: gone.txt"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    cli: Cli, settings: tuple[str, ...], overrides: tuple[str, ...], says: str
) -> None:
    outcome = cli("train", *settings, *overrides, "-o", "r")
    assert outcome.code == 2
    assert says in outcome.flat


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_language_model_learns(
    bits: str, cli: Cli, settings: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    more = (f"model.quantization={bits}", "method.rank=16", "task.chat.packing=pack")
    outcome = cli("train", *settings, *more, "-o", "run")
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["calibration"]["source"] == "token"
    assert record["metrics"]["final"]["loss"] < record["metrics"]["initial"]["loss"]
    assert "cast from" not in outcome.err
