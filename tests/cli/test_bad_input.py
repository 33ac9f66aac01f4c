"""Bad input: one readable block, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_runs import SMALL, Cli
from support.paths import REPO


def table(folder: Path, name: str, rows: list[tuple[str, str]]) -> Path:
    path = folder / name
    lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = [(f"sentence number {i} is {'fine' if i % 2 else 'poor'}", str(i % 2)) for i in range(24)]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("train", "trian.learning_rate=1"), 2, "did you mean train?"),
        (("train", "train.learning_rate=fast"), 2, "expected a number, got 'fast'"),
        (("train", "no_such_recipe.yaml"), 2, "no such file"),
        (("train", "a.yaml", "b.yaml"), 2, "expected one recipe, got 2"),
        (("train", "task=glue/xyz"), 2, "unknown task 'glue/xyz'"),
        (("train", "model=builtin:bert"), 2, "unknown built-in model"),
        (("train", "method=sparse"), 2, "did you mean sparsegrad?"),
        (("train", "method.density=0"), 2, "greater than 0"),
        (("train", "method.density=-1"), 2, "greater than 0"),
        (("train", "method.density=2"), 2, "less than or equal to 1"),
        (("train", "--resume"), 2, "needs to know which run"),
        (("train", "--no-such-option"), 2, "No such option"),
        (("compare",), 2, "expected the methods to compare"),
        (("compare", "--methods", "lora,mepro"), 2, "did you mean meprop?"),
        (("compare", "recipes/quickstart.yaml", "--seeds", "3"), 2, "names its own methods"),
        (("configs", "copy", "roberta"), 2, "no shipped recipe"),
        (("report", "nowhere"), 2, "nowhere"),
    ],
)
def test_usage_errors_exit_2_with_one_block(
    cli: Cli, arguments: tuple[str, ...], code: int, says: str
) -> None:
    outcome = cli(*arguments)
    assert outcome.code == code
    assert says in outcome.flat
    assert "Traceback" not in outcome.err


def test_label_column_missing_names_the_columns_there_are(cli: Cli, tmp_path: Path) -> None:
    path = table(tmp_path, "d.csv", GOOD)
    outcome = cli("train", "task=csv", f"task.path={path}", "task.columns={label: lable}", *SMALL)
    assert outcome.code == 2
    assert "lable" in outcome.flat and "label" in outcome.flat and "text" in outcome.flat


def test_label_unseen_in_training_is_refused(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    table(data, "train.csv", [(t, "good" if y == "1" else "bad") for t, y in GOOD])
    table(data, "validation.csv", [("a sentence", "ugly")])
    outcome = cli("train", "task=csv", f"task.path={data}", *SMALL)
    assert outcome.code == 2
    assert "ugly" in outcome.flat


def test_empty_split_is_refused(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    table(data, "train.csv", GOOD)
    table(data, "validation.csv", [])
    outcome = cli("train", "task=csv", f"task.path={data}", *SMALL)
    assert outcome.code == 2
    assert "empty" in outcome.flat or "no rows" in outcome.flat


def test_a_max_length_that_leaves_no_text_is_refused(cli: Cli) -> None:
    outcome = cli("train", *SMALL, "task.max_length=2", "-o", "r")
    assert outcome.code == 2
    assert "max_length" in outcome.flat
    assert json.loads(Path("r/run.json").read_text())["status"] == "failed"


def test_a_pattern_without_match_lists_the_linear_layers(cli: Cli) -> None:
    outcome = cli("train", *SMALL, "targets.modules=['*.up_proj']", "-o", "r")
    assert outcome.code == 2
    assert "*.up_proj" in outcome.flat and "intermediate.dense (1536 x 384)" in outcome.flat


def test_an_unreachable_hub_suggests_local_files(cli: Cli) -> None:
    outcome = cli("train", "model=roberta-base-that-is-not-cached", *SMALL)
    assert outcome.code == 1
    assert "roberta-base-that-is-not-cached" in outcome.flat
    assert "local folder" in outcome.flat


@pytest.mark.slow
def test_a_hub_that_does_not_answer_suggests_local_files(tmp_path: Path) -> None:
    """huggingface_hub tries six times, so this test is slow."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsegrad_cli", "train", "model=roberta-base-not-cached", *SMALL],
        cwd=tmp_path,
        env=os.environ
        | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "local folder" in done.stderr and "Traceback" not in done.stderr


def test_a_model_folder_without_a_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty-model").mkdir()
    outcome = cli("train", f"model={tmp_path / 'empty-model'}", *SMALL)
    assert outcome.code == 1
    assert "config.json" in outcome.flat


def test_a_nonempty_output_dir_is_refused_and_unchanged(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("precious", encoding="utf-8")
    outcome = cli("train", *SMALL, "-o", "r")
    assert outcome.code == 2
    assert "--resume" in outcome.flat and "--overwrite" in outcome.flat
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["thesis.txt"]
    assert "holds no run" in cli("train", *SMALL, "-o", "r", "--resume").flat


def test_a_basis_of_other_targets_or_a_damaged_one_is_refused(
    cli: Cli, tmp_path: Path, small_bert: str
) -> None:
    small = (f"model={small_bert}", *SMALL)
    made = cli("calibrate", *small, "-o", "basis", "targets.blocks=[0]")
    assert made.code == 0, made.err
    basis = tmp_path / "basis" / "basis.safetensors"
    other = cli("train", *small, f"calibration.basis={basis}", "-o", "r1")
    assert other.code == 2
    assert "another target set" in other.flat and "calibration.basis" in other.flat
    content = basis.read_bytes()
    basis.write_bytes(content[: len(content) // 2])
    cut = cli("train", *small, f"calibration.basis={basis}", "-o", "r2", "targets.blocks=[0]")
    assert cut.code == 1 and "basis" in cut.flat
    flipped = bytearray(content)
    flipped[-3] ^= 0xFF
    basis.write_bytes(bytes(flipped))
    bad = cli("train", *small, f"calibration.basis={basis}", "-o", "r3", "targets.blocks=[0]")
    assert bad.code == 1 and "digest" in bad.flat


def test_methods_that_train_the_weights_of_a_half_precision_model_need_autocast(cli: Cli) -> None:
    outcome = cli("train", *SMALL, "method=full", "model.dtype=bfloat16")
    assert outcome.code == 2
    assert "train.bf16" in outcome.flat


def test_divergence_is_a_clear_error(cli: Cli) -> None:
    outcome = cli("train", *SMALL, "method=full", "train.learning_rate=1e30", "-o", "r")
    assert outcome.code == 1
    assert "diverged" in outcome.flat or "finite" in outcome.flat
    assert json.loads(Path("r/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("task=sst2",), "did you mean glue/sst2?"),
        (("task=SST-2",), "did you mean glue/sst2?"),
        (("task=acceptability",), "did you mean builtin:acceptability?"),
        (("method=qlora",), "it is written method: lora with model.quantization: 4bit"),
        (("task.separator=;;",), "task.separator"),
        (
            ("task=glue/rte", "task.separator=;"),
            "task.separator has no effect: only CSV and TSV files",
        ),
    ],
)
def test_a_name_of_another_tool_suggests_ours(
    cli: Cli, arguments: tuple[str, ...], says: str
) -> None:
    outcome = cli("validate", "configs/quickstart.yaml", *arguments)
    assert outcome.code == 2
    assert says in outcome.flat


def test_a_misspelt_model_folder_is_found_before_the_hub_is_asked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.model_info", None)
    (tmp_path / "in" / "models" / "tinybert").mkdir(parents=True)
    (tmp_path / "in" / "models" / "tinybert" / "config.json").write_text("{}", encoding="utf-8")
    recipe = tmp_path / "in" / "r.yaml"
    for name in ("models/tinybrt", "./models/tinybrt", "../in/models/tinybrt"):
        recipe.write_text(f"task: builtin:acceptability\nmodel: {name}\n", encoding="utf-8")
        outcome = cli("train", str(recipe), *SMALL[1:])
        assert outcome.code == 2
        assert "r.yaml:2" in outcome.flat and "models/tinybert?" in outcome.flat


def test_a_missing_shard_is_refused_and_a_damaged_column_is_named(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    table(data, "train-00000-of-00002.csv", GOOD)
    outcome = cli("train", "task=csv", f"task.path={data}", *SMALL)
    assert outcome.code == 2
    assert "shard 1 of 2 of train is not there" in outcome.flat and str(data) in outcome.flat
