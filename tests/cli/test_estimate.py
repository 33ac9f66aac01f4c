"""``sparsegrad estimate`` as a user would type it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from support.cli_runs import METHODS, SMALL, Cli

from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.estimate import EstimateRecord
from sparsegrad_cli.report.estimate import estimate_screen
from sparsegrad_cli.report.terminal import screen

TINY = {
    "model_type": "bert",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A model folder with a configuration but no weights."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return f"model={folder}"


def test_estimate_equals_the_memory_that_a_run_counts(cli: Cli, tmp_path: Path) -> None:
    # With padding: an estimate does not know how many tokens of a batch are real.
    settings = (*METHODS["core"], *SMALL, "train.max_steps=2", "train.unpadded=false")
    assert cli("train", *settings, "-o", "run").code == 0
    counted = json.loads((tmp_path / "run" / "run.json").read_text())["memory"]
    batch, length = counted["batch_shape"]
    shape = ("--batch", str(batch), "--length", str(length), "--device", "cpu")
    outcome = cli("estimate", "run", *shape, "--json")
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out)["rows"]
    for phase in ("forward", "backward"):
        assert row["phases"][phase] == counted["phases"][phase]["peak_bytes"]
    # A run's optimizer figure leaves out the batch and its loss.
    beside = row["phases"]["optimizer"] - counted["phases"]["optimizer"]["peak_bytes"]
    assert 0 < beside <= (3 * batch * length + batch) * 8 + 64
    assert row["counts"]["trainable_targets"] > 0 and row["calibrate_peak_bytes"] > 0
    weights = row["categories"]["weights"]
    assert weights == counted["phases"]["load"]["categories"]["weights"]
    assert row["beyond_weights_bytes"] == row["peak_bytes"] - weights
    again = cli("estimate", "run", "-m", "sparsegrad", *shape, "--json")
    assert json.loads(again.out)["rows"][0]["phases"] == row["phases"]


def test_methods_are_matched_and_shown_in_full_at_80_columns(
    cli: Cli, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shape = (tiny, "method.density=0.05", "--length", "16", "--gpu", "3MiB", "--overhead", "1MiB")
    outcome = cli("estimate", *shape, "-m", "full, lora", "-m", "meprop,sparsegrad", "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record["conditions"]["kernels"] == "cuda" and record["room"]["total_bytes"] == 3 * 2**20
    rows = {row["label"]: row for row in record["rows"]}
    assert list(rows) == ["full", "lora", "meprop", "sparsegrad"]
    targets = {name: row["counts"]["trainable_targets"] for name, row in rows.items()}
    assert targets["full"] == 2 * 32 * 64
    assert targets["meprop"] == targets["sparsegrad"] == 2 * round(0.05 * 32 * 64)
    assert abs(targets["lora"] - targets["meprop"]) <= (32 + 64)
    assert rows["lora"]["fit"]["limited_by"] == "step"
    assert rows["sparsegrad"]["fit"]["limited_by"] in ("step", "calibration")
    for row in rows.values():
        assert row["fit"]["batch"] > 0 and row["fit"]["peak_bytes"] <= 2 * 2**20
        assert sum(row["categories"].values()) == row["peak_bytes"]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(screen(estimate_screen(EstimateRecord.model_validate(record))))
    shown = console.export_text()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for words in (
        "saved",
        "its local config.json",
        "CUDA: flash",
        "largest batch in 3.0 MiB",
        "limited",
    ):
        assert words in " ".join(shown.split())


def test_a_study_has_a_row_for_every_task_and_method(cli: Cli, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "name: two\nrecipe: configs/quickstart.yaml\nmethods: [full, meprop]\nseeds: [1, 2]\n"
        "tasks: [glue/rte, glue/stsb]\n",
        encoding="utf-8",
    )
    outcome = cli("estimate", "study.yaml", tiny, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert [(row["task"], row["label"]) for row in rows] == [
        (task, method) for task in ("glue/rte", "glue/stsb") for method in ("full", "meprop")
    ]
    assert all("40 positions" in " ".join(row["notes"]) for row in rows)  # 64 were asked for
    # A regression has one output, a classification here two.
    heads = [row["counts"]["trainable_head"] for row in rows]
    assert heads == [66, 66, 33, 33]
    refused = cli("estimate", "study.yaml", tiny, "-m", "lora")
    assert refused.code == 2 and "names its own methods" in refused.flat


def test_estimate_of_the_papers_recipe_needs_no_download(cli: Cli) -> None:
    """LLaMA-2 7B with one adapted block: the built-in configuration is enough."""
    before = rss_bytes()
    outcome = cli("estimate", "configs/llama2_oasst.yaml", "targets.blocks=[0]", "--json")
    assert outcome.code == 0, outcome.err
    assert rss_bytes() - before < 2**30
    (row,) = json.loads(outcome.out)["rows"]
    assert row["model"]["parameters"] == 6_738_415_616 and row["model"]["dtype"] == "bfloat16"
    assert "built-in table" in row["model"]["configuration"]
    assert row["batch_shape"] == [2, 512] and row["mask"] == "none"  # one text, cut every 512
    assert row["categories"]["weights"] == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert row["counts"]["trainable_targets"] == 2 * round(0.0022 * 4096 * 11008)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "24"), "'24' is not a size"),
        (("--gpu", "24GB"), "write 24GiB"),
        (("--gpu", "1GiB", "--overhead", "1GiB"), "leaves no memory"),
        (("--gpu", "1GiB", "--overhead", "much"), "'much' is not a size"),
        (("--device", "tpu"), "'tpu' is not one of 'cpu', 'cuda'"),
        (("--length", "0"), "--length"),
        (("--batch", "0"), "--batch"),
        (("-m", "lora,sparsgrad"), "--method 'sparsgrad' is not a method"),
        (("-m", "lora,lora"), "--method names a method twice"),
        (("calibration.decomposition=exact", "method.rank=0.5"), "share of energy"),
        (("task=builtin:dialogues",), "needs a causal language model"),
        (("targets.blocks=[7]",), "blocks with targets: 0 to 0"),
        (("task.name=glue/nothing",), "unknown task"),
        (("model.quantization=8bit",), "cannot be estimated"),
    ],
)
def test_invalid_input_of_estimate_is_one_error(
    cli: Cli, tiny: str, arguments: tuple[str, ...], message: str
) -> None:
    outcome = cli("estimate", tiny, *arguments)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert message in outcome.flat, outcome.flat


def test_a_folder_without_configuration_and_an_unreachable_model_are_errors(
    cli: Cli, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    outcome = cli("estimate", f"model={empty}")
    assert outcome.code == 1 and "no config.json" in outcome.flat
    outcome = cli("estimate", "model=someone/something")
    assert outcome.code == 1 and "someone/something" in outcome.flat
    assert "built-in" not in outcome.flat and "Llama-2-7b-hf" in outcome.flat
