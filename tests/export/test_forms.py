"""Every method in every form, loaded by plain transformers and peft.

The exported files must give the loss on the validation data that training recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import (
    ROWS,
    answers,
    base_of,
    by_peft,
    by_transformers,
    data_folder,
    record,
    tokenizer_of,
    train,
)
from support.tiny_models import BLOCKS, HIDDEN, INNER
from torch import Tensor, nn

import sparsegrad_cli
from sparsegrad_cli.methods.neighbours.change_settings import CHANGES
from sparsegrad_cli.methods.peft_folder import from_peft, modules_to_save
from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.peft import SparseGradLayer
from sparsegrad_cli.recipe.schema import TargetsSection

Exported = Callable[..., tuple[Path, dict[str, Any]]]

CORE = ("method.form=core", "method.density=0.05")
# name -> (overrides, architecture). The narrow side has 16 entries: rank 16 loses nothing.
MATRIX: dict[str, tuple[tuple[str, ...], str]] = {
    "full": (("method=full",), "bert"),
    "full-rest": (("method=full", "scope=rest"), "bert"),
    "lora": (("method=lora", "method.rank=3", "method.alpha=5"), "bert"),
    "lora-rslora-conv1d": (("method=lora", "method.rslora=true", "scope=rest"), "gpt2"),
    "meprop-entries": (("method=meprop", "method.density=0.05"), "bert"),
    "meprop-rows-conv1d": (("method=meprop", "method.select=rows", "method.density=0.1"), "gpt2"),
    "materialized": (("method.form=materialized", "method.density=0.05"), "bert"),
    "materialized-conv1d": (
        ("method.form=materialized", "method.density=0.05", "scope=rest"),
        "gpt2",
    ),
    "rotated": (("method.form=rotated", "method.density=0.05"), "bert"),
    "rotated-conv1d": (("method.form=rotated", "calibration.basis_per=kind"), "gpt2"),
    "core-static": ((*CORE, "method.rank=7"), "bert"),
    "core-static-model": (
        (*CORE, "method.allocation=model", "calibration.score=square", "scope=rest"),
        "gpt2",
    ),
    "core-dense-energy": (
        # Gradients of batches: the two kinds may then need different ranks for that share.
        (
            "method=sparsegrad",
            "method.support=dense",
            "method.rank=0.9",
            "calibration.basis_per=kind",
            "calibration.source=batch",
            "calibration.warmup_steps=0",
        ),
        "bert",
    ),
    "core-dynamic": ((*CORE, "method.support=dynamic", "method.rank=5", "scope=rest"), "bert"),
    "core-refresh": ((*CORE, "method.support=refresh", "method.refresh_steps=2"), "bert"),
    "core-gated": ((*CORE, "method.recompute=activation"), "llama"),
    **{
        f"change-{name}": ((f"method={name}", "train.learning_rate=3e-2"), architecture)
        for name, architecture in zip(CHANGES, ("bert", "gpt2") * len(CHANGES), strict=False)
    },
}
PATHS = {
    "bert": ("bert.encoder.layer", ("intermediate.dense", "output.dense")),
    "gpt2": ("transformer.h", ("mlp.c_fc", "mlp.c_proj")),
    "llama": ("model.layers", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
}


def targets_of(architecture: str) -> list[str]:
    blocks, kinds = PATHS[architecture]
    return [f"{blocks}.{number}.{kind}" for number in range(BLOCKS) for kind in kinds]


def assert_answers_as_trained(model: nn.Module, run: Path) -> Tensor:
    logits, loss = answers(model, tokenizer_of(run))
    trained = record(run)["metrics"]["final"]["loss"]
    assert loss == pytest.approx(trained, abs=2e-5)
    assert abs(trained - record(run)["metrics"]["initial"]["loss"]) > 1e-2, "training did nothing"
    return logits


# Two of the changes stand for the others, which share all but the formula: one draws numbers again
# from a key, and one holds factors that training data gave.
ROWS_OF_THE_MATRIX = [
    pytest.param(name, marks=pytest.mark.slow)
    if name.startswith("change-") and name not in ("change-nola", "change-lora_sb")
    else name
    for name in MATRIX
]


@pytest.mark.parametrize("name", ROWS_OF_THE_MATRIX)
def test_every_export_gives_the_recorded_validation_loss(
    name: str, runs: Callable[..., Path], exported: Exported
) -> None:
    overrides, architecture = MATRIX[name]
    run = runs(*overrides, architecture=architecture)
    narrow = () if name.startswith(("lora", "core", "change")) else ("--rank", str(HIDDEN))

    merged, said = exported(run, "merged")
    assert said["check"]["difference"] <= said["check"]["judged"]["tolerance"]
    assert said["check"]["examples"] == said["check"]["same_answers"] == ROWS
    assert said["rounding"] < 1e-5
    plain = by_transformers(merged)
    expected = assert_answers_as_trained(plain, run)
    fresh = type(plain)(plain.config)
    assert {n: t.shape for n, t in load_file(merged / "model.safetensors").items()} == {
        n: t.shape for n, t in fresh.state_dict().items()
    }

    adapter, said = exported(run, "lora", *narrow)
    assert said["check"]["judged"]["against"] == "the run" and not said["truncated"]
    assert said["error"] < 1e-5
    logits = assert_answers_as_trained(by_peft(run, adapter), run)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits.argmax(1), expected.argmax(1))

    own, said = exported(run, "adapter")
    assert said["check"]["difference"] == 0.0
    logits = assert_answers_as_trained(sparsegrad_cli.load_adapter(own), run)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    base = by_transformers(base_of(run), num_labels=2, pad_token_id=0)
    again = sparsegrad_cli.load_adapter(own, base)
    assert again is base
    assert torch.equal(answers(again, tokenizer_of(run))[0], logits)


def test_a_checkpoint_holds_the_factors_that_training_data_gave(
    runs: Callable[..., Path], exported: Exported
) -> None:
    run = runs("method=lora_sb", "train.learning_rate=3e-2", stop=True)
    merged = load_file(exported(run, "merged")[0] / "model.safetensors")
    base = load_file(Path(base_of(run)) / "model.safetensors")
    for name in targets_of("bert"):
        change_OI = (merged[f"{name}.weight"] - base[f"{name}.weight"]).double()
        assert 1 <= int(torch.linalg.matrix_rank(change_OI, atol=1e-4)) <= 8


@pytest.mark.parametrize("rank", [1, 5])
def test_truncated_change_is_the_nearest_of_its_rank(
    rank: int, runs: Callable[..., Path], exported: Exported
) -> None:
    """The reference is torch's singular value decomposition of the merged model's change."""
    run = runs("method=full")
    folder, said = exported(run, "lora", "--rank", str(rank))
    whole = load_file(exported(run, "merged")[0] / "model.safetensors")
    base = load_file(Path(base_of(run)) / "model.safetensors")
    parts = load_file(folder / "adapter_model.safetensors")
    lost = total = 0.0
    for row in said["targets"]:
        name = row["name"]
        change = whole[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        prefix = f"base_model.model.{name}.lora"
        product = parts[f"{prefix}_B.weight"].double() @ parts[f"{prefix}_A.weight"].double()
        torch.testing.assert_close(product, nearest, atol=1e-6, rtol=0)
        relative = float(s[rank:].norm() / s.norm())
        assert row["error"] == pytest.approx(relative, rel=1e-4) and relative > 0.05
        assert row["rank"] == rank
        lost += float(s[rank:].square().sum())
        total += float(s.square().sum())
    assert said["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    # Cut, it does not answer as the run did: that is said; but it holds exactly what was cut.
    check = said["check"]
    assert check["difference"] > 1e-3 > check["judged"]["difference"]
    assert check["judged"]["against"] == "the cut change"


def test_lora_run_is_exported_with_a_scale_of_one(
    runs: Callable[..., Path], exported: Exported
) -> None:
    """The scale is folded into B, so readers without rslora or alpha load it correctly."""
    run = runs(*MATRIX["lora-rslora-conv1d"][0], architecture="gpt2")
    folder, _ = exported(run, "lora")
    trained = from_peft(load_file(run / "adapter" / "adapter_model.safetensors"))
    written = load_file(folder / "adapter_model.safetensors")
    for name in targets_of("gpt2"):
        parts = {}
        for part in ("lora_A", "lora_B"):
            parts[part] = trained[f"{name}.{part}.default.weight"]
        prefix = f"base_model.model.{name}"
        assert torch.equal(written[f"{prefix}.lora_A.weight"], parts["lora_A"])
        scaled = 16 / 8**0.5 * parts["lora_B"].double()
        assert torch.equal(written[f"{prefix}.lora_B.weight"], scaled.float())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert not config["rank_pattern"] and config["fan_in_fan_out"] is True


def test_core_is_exported_as_lora_of_its_rank(
    runs: Callable[..., Path], exported: Exported
) -> None:
    run = runs(*MATRIX["core-static"][0])
    folder, said = exported(run, "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7 and config["lora_bias"] is False
    assert {row["rank"] for row in said["targets"]} == {7}
    _, cut = exported(run, "lora", "--rank", "2", "--overwrite")
    assert cut["truncated"] and {row["rank"] for row in cut["targets"]} == {2}
    _, same = exported(run, "lora", "--rank", "7", "--overwrite")
    assert not same["truncated"] and same["error"] == said["error"]


def test_factors_of_lower_rank_are_padded_with_zeros(
    runs: Callable[..., Path], exported: Exported
) -> None:
    overrides, _ = MATRIX["core-dense-energy"]
    run = runs(*overrides, "calibration.basis_per=layer")
    folder, said = exported(run, "lora")
    ranks = {row["name"]: row["rank"] for row in said["targets"]}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(set(ranks.values())) > 1, "this run is meant to have several"
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == said["rank"] == max(ranks.values())
    written = load_file(folder / "adapter_model.safetensors")
    for name, rank in ranks.items():
        a_RI = written[f"base_model.model.{name}.lora_A.weight"]
        b_OR = written[f"base_model.model.{name}.lora_B.weight"]
        assert a_RI.shape[0] == b_OR.shape[1] == said["rank"]
        assert not a_RI[rank:].any() and not b_OR[:, rank:].any()
        assert bool(a_RI[rank - 1].any()) and bool(b_OR[:, rank - 1].any())


def test_modules_that_peft_cannot_factor_are_saved_whole(
    runs: Callable[..., Path], exported: Exported
) -> None:
    """BERT's files hold no pooler, so its randomly drawn values belong to the export."""
    head, said = exported(runs(*MATRIX["core-static"][0]), "lora")
    assert said["modules"] == ["bert.pooler.dense", "classifier"]
    rest, said = exported(runs(*MATRIX["core-dynamic"][0]), "lora")
    assert "bert.embeddings.word_embeddings" in said["modules"]
    assert "bert.encoder.layer.2.attention.output.LayerNorm" in said["modules"]
    assert not any(name in said["modules"] for name in targets_of("bert"))
    config = json.loads((rest / "adapter_config.json").read_text())
    assert config["lora_bias"] is True, "biases of targets train under scope rest"
    written = load_file(head / "adapter_model.safetensors")
    trained = load_file(runs(*MATRIX["core-static"][0]) / "adapter" / "adapter.safetensors")
    assert torch.equal(written["base_model.model.classifier.weight"], trained["classifier.weight"])


def test_adapter_shares_bases_and_records_their_size(
    runs: Callable[..., Path], exported: Exported
) -> None:
    folder, said = exported(runs(*MATRIX["core-dense-energy"][0]), "adapter")
    tensors = load_file(folder / "adapter.safetensors")
    kinds = {"intermediate.dense", "output.dense"}
    assert {n.removeprefix("basis/q_out/") for n in tensors if n.startswith("basis/q_o")} == kinds
    assert said["fresh"] == ["bert.pooler.dense.weight"]
    model = sparsegrad_cli.load_adapter(folder)
    layers: list[Any] = [model.get_submodule(name) for name in targets_of("bert")]
    assert all(isinstance(layer, SparseGradLayer) for layer in layers)
    first, second, third = (layer.sparsegrad_q_out["default"] for layer in layers[:3])
    assert first is third and first is not second
    assert layers[0].sparsegrad_values["default"].requires_grad
    assert not layers[0].weight.requires_grad
    assert not model.training


def test_half_precision_weights_keep_their_dtype(
    runs: Callable[..., Path], exported: Exported, cli: Any
) -> None:
    run = runs("model.dtype=bfloat16", *MATRIX["core-static"][0])
    merged, said = exported(run, "merged")
    plain = by_transformers(merged)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    # 8 bits of mantissa: what rounding does to W + change is up to 2^-8 of |W|, not of the change.
    base = by_transformers(base_of(run), dtype=torch.bfloat16)
    name = targets_of("bert")[0]
    lora, about = exported(run, "lora")
    parts = load_file(lora / "adapter_model.safetensors")
    assert {t.dtype for n, t in parts.items() if "lora_" in n} == {torch.float32}
    product = (
        parts[f"base_model.model.{name}.lora_B.weight"].double()
        @ parts[f"base_model.model.{name}.lora_A.weight"].double()
    )
    exact = base.get_parameter(f"{name}.weight").double() + product
    error = (plain.get_parameter(f"{name}.weight").double() - exact).detach()
    row = said["targets"][0]
    assert row["rounding"] == pytest.approx(float(error.norm() / product.norm()), rel=1e-3)
    assert row["rounding_max"] == pytest.approx(float(error.abs().max()), rel=1e-3)
    assert 1e-3 < said["rounding"] < 0.5
    assert about["error"] < 1e-6, "beside the weights nothing is rounded away"
    own, exact_again = exported(run, "adapter")
    assert exact_again["check"]["difference"] == 0.0
    tensors = load_file(own / "adapter.safetensors")
    assert {t.dtype for n, t in tensors.items() if n.startswith("basis/q")} == {torch.bfloat16}
    expected = answers(sparsegrad_cli.load_adapter(own), tokenizer_of(run))[0].float()
    for model in (plain, by_peft(run, lora).to(torch.bfloat16)):
        got = answers(model, tokenizer_of(run))[0].float()
        assert float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_exported_model_is_the_base_of_the_next_run(
    runs: Callable[..., Path], exported: Exported, tmp_path: Path
) -> None:
    merged, said = exported(runs(*MATRIX["core-static"][0]), "merged")
    assert INNER * HIDDEN and said["model"]["auto_class"] == "AutoModelForSequenceClassification"
    again = train(tmp_path / "next", merged, data_folder(tmp_path / "data"), "method=lora")
    assert record(again)["metrics"]["initial"]["loss"] == pytest.approx(
        record(runs(*MATRIX["core-static"][0]))["metrics"]["final"]["loss"], abs=2e-5
    )


def test_large_model_is_written_in_shards(
    runs: Callable[..., Path], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsegrad_cli.export.merged.SHARD_SIZE", "20KB")
    run = runs("method=full")
    folder, said = exported(run, "merged")
    shards = [name for name in said["files"] if name.startswith("model-")]
    assert len(shards) > 2 and "model.safetensors.index.json" in said["files"]
    assert said["bytes"] == sum((folder / name).stat().st_size for name in said["files"])
    assert_answers_as_trained(by_transformers(folder), run)


def test_regression_export_compares_scores_not_answers(
    runs: Callable[..., Path], exported: Exported, cli: Any, tmp_path: Path
) -> None:
    data = data_folder(tmp_path / "data")
    for name in ("train.csv", "validation.csv"):
        path = data / name
        path.write_text(path.read_text().replace(",low", ",0.25").replace(",high", ",1.5"))
    base = Path(base_of(runs("method=full")))
    run = train(tmp_path / "run", base, data, *MATRIX["core-static"][0])
    for form in ("merged", "lora", "adapter"):
        folder, said = exported(run, form)
        assert said["check"]["same_answers"] is None and said["check"]["answers"] == ROWS
    merged: Any = by_transformers(tmp_path / "run-merged")
    assert merged.config.num_labels == 1
    shown = cli("export", str(run), "--to", "lora", "-o", str(folder.parent / "again"))
    assert "Same answers" not in shown.out and "Logits differ by" in shown.out


def test_lora_refuses_a_changed_parameter_in_a_module_with_a_target(
    runs: Callable[..., Path], refused: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft saves whole modules, and the module of this parameter also contains a target."""
    run = runs("method=full")
    model = by_transformers(base_of(run), num_labels=2)
    gate, norm = "bert.encoder.layer.0.gate", "bert.encoder.layer.0.output.LayerNorm"
    targets = [target.name for target in find_targets(model, TargetsSection())]
    changed = [gate, f"{norm}.weight", f"{norm}.bias", "classifier.weight"]
    found = modules_to_save(model, changed, targets, classifier=True)
    assert found == ([norm, "classifier"], [gate])
    monkeypatch.setattr("sparsegrad_cli.export.lora.modules_to_save", lambda *_, **__: ([], [gate]))
    said = refused(2, run, "--to", "lora", "--rank", "2")
    assert f"cannot hold {gate}" in said.flat and "--to merged" in said.flat
