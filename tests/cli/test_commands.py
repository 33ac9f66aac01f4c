"""The commands as a user would type them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.adapter_paths import adapter_path
from support.cli_runs import METHODS, SMALL, Cli
from support.paths import REPO

from sparsegrad_cli import __version__


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").out.strip() == f"sparsegrad {__version__}"
    commands = ("train", "calibrate", "compare", "estimate", "validate", "report", "export")
    for command in (*commands, "generate", "judge", "configs"):
        outcome = cli(command, "--help")
        assert outcome.code == 0 and "Usage" in outcome.out


def test_validate_prints_the_resolved_recipe(cli: Cli) -> None:
    outcome = cli("validate", "configs/roberta_glue.yaml", "task.name=glue/cola")
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out)["train"]["per_device_train_batch_size"] == 16
    as_json = json.loads(cli("validate", "quickstart", "--json").out)
    assert as_json["model"]["name"] == "builtin:minilm"
    study = cli("validate", "recipes/paper_table_5_roberta.yaml")
    assert study.code == 0 and "96 runs" in study.out
    assert cli("validate", "method.density=7").code == 2


def test_configs_are_listed_and_copied(cli: Cli, tmp_path: Path) -> None:
    listed = cli("configs").out
    assert listed == cli("configs", "list").out
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    starters = ["configs/quickstart.yaml", "configs/smollm2_dialogues.yaml"]
    assert names[:3] == [*starters, "recipes/quickstart.yaml"]
    assert len(names) == len(set(names))
    for name in ("quickstart", "bert_glue", "roberta_glue", "roberta_large_glue"):
        assert f"configs/{name}.yaml" in listed
    assert cli("configs", "copy", "roberta_glue").code == 0
    copied = tmp_path / "roberta_glue.yaml"
    assert copied.read_text() == (REPO / "configs" / "roberta_glue.yaml").read_text()
    assert cli("configs", "copy", "roberta_glue").code == 2
    assert cli("validate", "roberta_glue.yaml", "seed=3").code == 0
    # Settings of accelerate's launcher are listed too, but are not recipes.
    assert "configs/accelerate/fsdp2.yaml" in listed
    assert cli("configs", "copy", "accelerate/fsdp2").code == 0
    assert (tmp_path / "fsdp2.yaml").read_text().startswith("# Several GPUs")
    assert cli("validate", "accelerate/fsdp2").code == 2


@pytest.mark.parametrize(
    ("method", "columns"),
    [
        # Only a square basis can be transposed, as the published code does.
        ("sparsegrad", {"original", "transposed", "kind_basis"}),
        ("core", {"original", "kind_basis", "whole_core"}),
    ],
)
def test_calibrate_then_train_on_its_basis(
    cli: Cli, tmp_path: Path, small_bert: str, method: str, columns: set[str]
) -> None:
    common = (f"model={small_bert}", *METHODS[method], *SMALL)
    made = cli("calibrate", *common, "-o", "basis")
    assert made.code == 0, made.err
    run = json.loads((tmp_path / "basis" / "run.json").read_text())
    assert run["status"] == "done" and run["command"] == "calibrate"
    assert run["calibration"]["seconds"] > 0 and run["calibration"]["peak_bytes"] > 0
    assert columns == set(run["calibration"]["energy"]["rows"][0]) - {"target", "kind"}
    compared = run["calibration"]["energy"]["compared"]
    for row in compared["rows"]:
        assert 0 < row["support"] <= 1 and 0 < row["original"] < 1 and row["full_basis"] <= 1
    # A basis of few steps may not suit every layer.
    mean = {name: sum(row[name] for row in compared["rows"]) for name in ("original", "full_basis")}
    assert mean["original"] < mean["full_basis"]
    assert set(compared["mean_by_kind"]) == {"intermediate.dense", "output.dense"}
    page = (tmp_path / "basis" / "report.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "basis" / "report.md").read_text(encoding="utf-8")
    for shown in (made.out, page, markdown):
        assert compared["verdict"][:20] in " ".join(shown.split())
        for column in ("support that trains", "full-rank basis"):
            assert column in " ".join(shown.split()) or shown is made.out
    assert len(page) > 10_000
    basis = tmp_path / "basis" / "basis.safetensors"
    settings = (*common, f"calibration.basis={basis}")
    trained = cli("train", *settings, "-o", "run", "--json")
    assert trained.code == 0, trained.err
    record = json.loads(trained.out)
    assert record["calibration"]["reused"] is True
    assert record["calibration"]["seconds"] == run["calibration"]["seconds"]
    assert record["time"]["steps"] == 6


def test_a_reused_basis_gives_the_same_run_as_a_new_one(
    cli: Cli, tmp_path: Path, small_bert: str
) -> None:
    """Only the calibration block differs, even with thin bases, scores and a warm head."""
    common = (
        f"model={small_bert}",
        *METHODS["core"],
        *SMALL,
        "calibration.source=token",
        "calibration.decomposition=randomized",
        "calibration.score=square",
        "calibration.warmup_steps=3",
        "calibration.keep_head=true",
    )
    made = cli("calibrate", *common, "-o", "basis")
    assert made.code == 0, made.err
    energy = json.loads((tmp_path / "basis" / "run.json").read_text())["calibration"]["energy"]
    assert 0 < energy["rows"][0]["kind_basis"] < 1
    assert cli("train", *common, "-o", "own").code == 0
    basis = tmp_path / "basis" / "basis.safetensors"
    assert cli("train", *common, f"calibration.basis={basis}", "-o", "reused").code == 0
    own, reused = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("own", "reused"))
    assert reused["calibration"]["reused"] and not own["calibration"]["reused"]
    assert reused["metrics"]["history"] == own["metrics"]["history"]
    assert reused["hashes"] == own["hashes"]
    once = ("train.max_steps=1", "train.eval_steps=1")
    cold = cli("train", f"model={small_bert}", *METHODS["full"], *SMALL, *once, "-o", "cold")
    assert cold.code == 0
    other = json.loads((tmp_path / "cold" / "run.json").read_text())
    assert other["hashes"]["head_init"] != own["hashes"]["head_init"]


@pytest.mark.parametrize("method", METHODS)
def test_train_writes_a_complete_run(
    request: pytest.FixtureRequest, cli: Cli, tmp_path: Path, small_bert: str, method: str
) -> None:
    if method == "core":  # whose report has all kinds of figures
        request.getfixturevalue("figures")
    outcome = cli("train", f"model={small_bert}", *METHODS[method], *SMALL, "-o", "run")
    assert outcome.code == 0, outcome.err
    assert "report.html" in outcome.out
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "done"
    assert [r["step"] for r in run["metrics"]["history"]] == [0, 3, 6]
    assert [r["step"] for r in run["metrics"]["train"]] == [2, 4, 6]
    phases = run["memory"]["phases"]
    assert {"load", "forward", "backward", "optimizer", "evaluate"} <= set(phases)
    assert ("calibrate" in phases) == (method in ("sparsegrad", "core"))
    for phase in phases.values():
        assert sum(phase["categories"].values()) == phase["peak_bytes"]
        assert phase["categories"]["weights"] > 3.6 * run["model"]["parameters"]
    assert phases["optimizer"]["categories"]["optimizer_state"] > 0
    assert phases["backward"]["categories"]["gradients"] > 0
    for name in ("recipe.yaml", "steps.jsonl", "report.html", "report.md"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert adapter_path(tmp_path / "run").is_file()
    again = cli("validate", "run/recipe.yaml")
    assert again.code == 0
    assert cli("report", "run").code == 0


def test_runs_without_a_name_are_numbered(cli: Cli, tmp_path: Path, small_bert: str) -> None:
    for _ in range(2):
        assert (
            cli("train", f"model={small_bert}", "method=full", *SMALL, "train.max_steps=1").code
            == 0
        )
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "acceptability-full-1",
        "acceptability-full-2",
    ]


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys\nimport sparsegrad_cli.cli.app\nimport sparsegrad_cli.judge.judge_answers\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
