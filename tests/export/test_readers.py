"""Exports work with peft, pipelines and servers, and their model cards are correct."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import structural_rank
from support.cli_runs import Cli, Outcome
from support.small_runs import ROWS, answers, base_folder, data_folder, record, tokenizer_of, train

from sparsegrad_cli.export.forms import FORMS
from sparsegrad_cli.models.pretrained import locate
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.report.next_steps import use_commands
from sparsegrad_cli.restore.init_from import Initial

Exported = Callable[..., tuple[Path, dict[str, Any]]]

THIN = ("method.form=core", "method.density=0.02", "method.rank=12")  # 12 values in 12 x 12


def term_ranks(run: Path) -> dict[str, int]:
    """Return target -> term rank of the support that trained in it."""
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    found = {}
    for name, positions in tensors.items():
        if name.endswith(".support"):
            rows, columns = divmod(positions.numpy(), 12)
            pattern = coo_array(([1.0] * len(rows), (rows, columns)), shape=(12, 12))
            found[name.removesuffix(".support")] = int(structural_rank(pattern.tocsr()))
    return found


def test_static_support_is_exported_at_the_term_rank_of_its_mask(
    runs: Callable[..., Path], exported: Exported, cli: Cli
) -> None:
    run = runs(*THIN)
    folder, said = exported(run, "lora")
    ranks = {row["name"]: row["rank"] for row in said["targets"]}
    assert ranks == term_ranks(run) and max(ranks.values()) < 12
    assert said["error"] < 1e-6 and not said["truncated"]
    assert said["check"]["difference"] < 1e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == said["rank"] == max(ranks.values())
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    shown = cli("export", str(run), "--to", "lora", "-o", "again").out
    assert f"that need {min(ranks.values())} to {max(ranks.values())}, the rest zeros" in shown


def test_server_rank_pads_to_a_supported_rank(
    runs: Callable[..., Path], exported: Exported
) -> None:
    run = runs(*THIN)
    _, exact = exported(run, "lora")
    folder, said = exported(run, "lora", "--server-rank", "--overwrite")
    assert 1 < exact["rank"] < said["rank"] == 8
    assert said["error"] == exact["error"] and not said["truncated"]
    parts = load_file(folder / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in parts.items() if ".lora_A." in n} == {said["rank"]}
    _, said = exported(run, "lora", "--server-rank", "--rank", "2", "--overwrite")
    assert said["rank"] == 8 and said["truncated"]
    assert {row["rank"] for row in said["targets"]} == {2} and said["error"] > 1e-3
    _, said = exported(run, "lora", "--server-rank", "--rank", "1", "--overwrite")
    assert said["rank"] == 1


def test_server_rank_truncates_a_rank_above_the_highest(
    runs: Callable[..., Path], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsegrad_cli.export.lora.SERVER_RANKS", (1, 2))
    _, said = exported(runs(*THIN), "lora", "--server-rank")
    assert said["rank"] == 2 and said["truncated"] and said["error"] > 0
    assert said["check"]["judged"]["against"] == "the cut change"


def test_server_rank_is_refused_for_other_forms(
    runs: Callable[..., Path], refused: Callable[..., Outcome]
) -> None:
    run = runs(*THIN)
    assert "--to lora" in refused(2, run, "--to", "merged", "--server-rank").flat
    said = refused(2, runs("method=full"), "--to", "lora", "--server-rank")
    assert "the change has full rank" in said.flat and "--rank" in said.flat


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on a base model with a head of three classes, a licence and no pad token."""
    from transformers import AutoModelForSequenceClassification

    place = tmp_path_factory.mktemp("labelled")
    base = base_folder(place / "secret-place" / "tiny gpt", "gpt2", pad_token_id=None)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, id2label={0: "joy", 1: "anger", 2: "fear"}
    )
    model.save_pretrained(base)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    return train(place / "run", base, data_folder(place / "data"), "method=lora")


def test_load_line_and_model_card_load_the_labels(
    labelled: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import transformers

    names = {**vars(transformers), "PeftModel": peft.PeftModel}
    merged, said = exported(labelled, "merged")
    expected, loss = answers(eval(said["load"], names), tokenizer_of(labelled))
    assert loss == pytest.approx(record(labelled)["metrics"]["final"]["loss"], abs=2e-5)
    folder, said = exported(labelled, "lora")
    labels, numbers = {0: "high", 1: "low"}, {"high": 0, "low": 1}
    model = eval(said["load"], names)
    assert model.config.id2label == labels and model.config.label2id == numbers
    torch.testing.assert_close(answers(model, tokenizer_of(labelled))[0], expected)

    texts = ["abc", "zyx", "mno"]
    tokenizer = tokenizer_of(labelled)
    want = [labels[int(number)] for number in _classes(model, tokenizer, texts)]
    for place in (merged, folder):
        monkeypatch.chdir(place)
        blocks = code_of((place / "README.md").read_text(encoding="utf-8"))
        source = json.loads(json.dumps(said["model"]["name"]))
        for code in blocks:
            scope: dict[str, Any] = {}
            exec(code.replace("PATH/TO/tiny gpt", source), scope)
            if "model" in scope:
                assert scope["model"].config.id2label == labels
                assert scope["model"].config.label2id == numbers
                torch.testing.assert_close(answers(scope["model"], tokenizer)[0], expected)
            if "pipe" in scope:
                assert [found["label"] for found in scope["pipe"](texts)] == want
        assert any("pipe" in code for code in blocks)
        assert any("model =" in code for code in blocks)
    pipe = eval(said["pipeline"], names)
    assert [found["label"] for found in pipe(texts)] == want


def test_the_lines_after_a_run_lead_to_a_pipeline(labelled: Path, cli: Cli, tmp_path: Path) -> None:
    import transformers

    run = shutil.copytree(labelled, tmp_path / "it\u2019s a run")
    predict, export, pipeline = use_commands(load_run(run), str(run))
    for command in (predict, export):
        assert cli(*shlex.split(command.line)[1:]).code == 0
    pipe = eval(pipeline.line, vars(transformers))
    assert pipe("abc")[0]["label"] in ("high", "low")


@torch.no_grad()
def _classes(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    return model.eval()(**inputs).logits.argmax(-1)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_model_card_names_the_form_and_no_local_path(
    form: str, labelled: Path, exported: Exported
) -> None:
    folder, said = exported(labelled, form)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "README.md" in said["files"]
    for path in (folder, labelled, Path(said["model"]["name"])):
        assert str(path) not in card and str(path.parent) not in card
    assert "secret-place" not in card and "More Information Needed" not in card
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["license"] == "apache-2.0" and "base_model" not in about
    assert about["library_name"] in ("transformers", "peft", "sparsegrad")
    assert about["pipeline_tag"] == "text-classification" and "lora" in about["tags"]
    run = record(labelled)
    best, counts = run["metrics"]["best"], run["counts"]
    (result,) = about["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == best["score"] and result["dataset"]["type"] == "csv"
    assert result["dataset"]["split"] == "validation" and about["metrics"] == ["accuracy"]
    shown = re.search(rf"\| own data \(csv\), validation \| {ROWS} \| accuracy \| ([\d.]+) ", card)
    assert shown and float(shown[1]) == pytest.approx(best["score"], abs=1e-3)
    assert f"{counts['trainable']:,} of {counts['model_parameters']:,} per step" in card
    assert "tiny gpt, fine-tuned on own data (csv)" in card and "rank 8" in card
    assert "learning rate 0.03" in card and "seed 42" in card and "Step 6, the last" in card
    for words in ("0: high, 1: low", f"{ROWS} of validation", "Licence", "at most 16 tokens"):
        assert words in card


def test_model_card_of_a_base_without_a_licence_and_an_unfinished_run(
    runs: Callable[..., Path], exported: Exported
) -> None:
    folder, _ = exported(runs("method=lora", stop=True), "merged")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license:" not in card and "add the field `license`" in card
    assert "model-index" not in card
    assert "None: checkpoint-6 of a run that has not finished" in card


def test_model_card_has_the_intervals_of_evaluate(
    runs: Callable[..., Path], copy: Callable[[Path], Path], exported: Exported, cli: Cli
) -> None:
    run = copy(runs("method=lora"))
    data = Path(load_recipe(run / "recipe.yaml").recipe.task.path or "") / "validation.csv"
    told = cli("evaluate", str(run), str(data), "-o", str(run / "test"), "--resamples", "50")
    assert told.code == 0, told.err
    metrics = json.loads((run / "test" / "evaluation.json").read_text())["metrics"]
    folder, _ = exported(run, "lora")
    card = (folder / "README.md").read_text(encoding="utf-8")
    low, high = (f"{end:.4g}" for end in metrics["accuracy"]["interval"])
    shown = re.search(
        r"\| validation.csv \| 24 \| accuracy \| \S+ \| ([\d.]+) to ([\d.]+) \|", card
    )
    assert shown and shown.groups() == (low, high)
    assert str(data) not in card and "bootstrap" in card


def test_pipeline_gives_the_score_of_a_regression(
    runs: Callable[..., Path], exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given one class without a problem type, a pipeline applies a sigmoid to the score."""
    data = data_folder(tmp_path / "data")
    for name in ("train.csv", "validation.csv"):
        path = data / name
        path.write_text(path.read_text().replace(",low", ",0.25").replace(",high", ",7.5"))
    base = Path(record(runs("method=full"))["model"]["name"])
    run = train(tmp_path / "run", base, data, "method=lora", "train.max_steps=40")
    folder, _ = exported(run, "lora")
    monkeypatch.chdir(folder)
    code = code_of((folder / "README.md").read_text(encoding="utf-8"))[1]
    scope: dict[str, Any] = {}
    exec(code, scope)
    tokenizer = tokenizer_of(run)
    with torch.no_grad():
        inputs = tokenizer(["zyx"], return_tensors="pt")
        score = float(scope["model"].eval()(**inputs).logits)
    found = scope["pipe"](["zyx"])[0]
    assert found["label"] == "score" and found["score"] == pytest.approx(score, abs=1e-4)
    assert score > 1


def test_export_with_other_labels_is_removed(
    runs: Callable[..., Path], refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsegrad_cli.export.base_model import BaseModel

    plain = BaseModel.of.__func__  # type: ignore[attr-defined]

    def unnamed(kind: Any, section: Any, model: Any) -> BaseModel:
        found: BaseModel = plain(kind, section, model)
        for name in ("id2label", "label2id"):
            found.arguments.pop(name)
        return found

    monkeypatch.setattr(BaseModel, "of", classmethod(unnamed))
    said = refused(1, runs("method=lora"), "--to", "lora")
    assert "other labels than the run" in said.flat and "LABEL_0" in said.flat


def test_model_card_of_the_builtin_model_has_no_path(cli: Cli, tmp_path: Path) -> None:
    small = ("task.train_limit=32", "task.eval_limit=16", "task.max_length=24")
    steps = ("train.max_steps=2", "train.per_device_train_batch_size=8", "method=lora")
    assert cli("train", *small, *steps, "-q", "-o", "run").code == 0
    assert cli("export", "run", "--to", "lora", "-q").code == 0
    # A run can start from it, although a built-in model refuses model.trust_remote_code.
    start = Initial(load_recipe(None, ("method=lora", f"init_from={tmp_path / 'run'}")))
    assert start.run is not None and start.basis() is None
    folder = tmp_path / "run" / "export-lora"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "builtin:minilm" in card and locate("builtin:minilm") not in card
    assert str(tmp_path) not in card
    shutil.rmtree(tmp_path / "run")
