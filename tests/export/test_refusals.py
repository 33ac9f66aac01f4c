"""Refused exports end with one clear error and leave no files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.adapter_paths import adapter_path
from support.cli_runs import Cli, Outcome
from support.small_runs import (
    answers,
    base_folder,
    by_transformers,
    data_folder,
    record,
    tokenizer_of,
    train,
)
from torch import Tensor

from sparsegrad_cli.run.checkpoints import seal

Runs = Callable[..., Path]
Refused = Callable[..., Outcome]
Copy = Callable[[Path], Path]

STATIC = ("method.form=core", "method.density=0.05", "method.rank=7")
SPARSE = ("method=meprop", "method.density=0.05")
UP = "bert.encoder.layer.0.intermediate.dense"


def edit_yaml(path: Path, section: str, **values: Any) -> None:
    recipe = yaml.safe_load(path.read_text())
    recipe[section].update(values)
    path.write_text(yaml.safe_dump(recipe))


# --- what is no finished run


def test_folder_without_a_training_run_is_refused(
    runs: Runs, copy: Copy, refused: Refused, tmp_path: Path
) -> None:
    assert "does not exist" in refused(2, tmp_path / "nowhere", "--to", "merged").flat
    (tmp_path / "empty").mkdir()
    assert "neither run.json" in refused(2, tmp_path / "empty", "--to", "merged").flat
    run = copy(runs("method=full"))
    about = record(run)
    for changes, says in (
        ({"cells": []}, "is a comparison"),
        ({"command": "calibrate"}, "holds a calibration"),
    ):
        (run / "run.json").write_text(json.dumps(about | changes))
        assert says in refused(2, run, "--to", "merged").flat
    (run / "run.json").write_text("{")
    assert "damaged" in refused(1, run, "--to", "merged").flat
    for block, key in (("model", "fingerprint"), ("counts", "targets")):
        broken = about | {block: {k: v for k, v in about[block].items() if k != key}}
        (run / "run.json").write_text(json.dumps(broken))
        assert f"{block}.{key} is missing" in refused(1, run, "--to", "merged").flat


def test_usage(runs: Runs, refused: Refused, cli: Cli) -> None:
    run = runs("method=full")
    assert cli("export", str(run)).code == 2
    assert cli("export", str(run), "--to", "onnx").code == 2
    assert cli("export", str(run), "--to", "lora", "--rank", "0").code == 2
    assert "has no rank" in refused(2, run, "--to", "merged", "--rank", "4").flat
    full = refused(2, run, "--to", "lora")
    assert "full rank" in full.flat and "--rank" in full.flat
    other = refused(2, run, "method.density=0.5", "--to", "merged")
    assert "cannot be changed after training" in other.flat and "model.name" in other.flat


def test_recipe_edited_after_the_run_is_refused(runs: Runs, copy: Copy, refused: Refused) -> None:
    """Another alpha gives another model with the same adapter."""
    run = copy(runs("method=lora", "method.rank=3", "method.alpha=5"))
    edit_yaml(run / "recipe.yaml", "method", alpha=50.0)
    outcome = refused(1, run, "--to", "merged")
    assert "method.alpha is 50.0, it was 5.0" in outcome.flat
    (run / "recipe.yaml").unlink()
    assert "no recipe.yaml" in refused(1, run, "--to", "merged").flat


# --- what has gone or changed since


def test_missing_or_changed_base_model_is_refused(
    runs: Runs, copy: Copy, refused: Refused, cli: Cli, tmp_path: Path
) -> None:
    run = copy(runs(*STATIC))
    base = Path(yaml.safe_load((run / "recipe.yaml").read_text())["model"]["name"])
    edit_yaml(run / "recipe.yaml", "model", name=str(tmp_path / "moved"))
    gone = refused(2, run, "--to", "merged")
    assert "no such folder" in gone.flat and "model.name=PATH" in gone.flat
    (tmp_path / "moved").mkdir()
    empty = refused(1, run, "--to", "merged")
    assert "base model of this run cannot be loaded" in empty.flat and "config.json" in empty.flat
    # Said where it is now, it goes; one of other weights does not.
    there = cli("export", str(run), f"model.name={base}", "--to", "merged")
    assert there.code == 0, there.err
    shutil.rmtree(run / "export-merged")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights[f"{UP}.weight"][0, 0] += 1.0
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    changed = refused(2, run, f"model.name={other}", "--to", "merged")
    assert "base model has changed" in changed.flat


def test_another_basis_or_other_labels_are_refused(
    runs: Runs, copy: Copy, refused: Refused, tmp_path: Path
) -> None:
    run = copy(runs(*STATIC))
    basis = run / "basis.safetensors"
    assert record(run)["calibration"]["digest"]
    shutil.copy(runs(*STATIC, "calibration.steps=2") / "basis.safetensors", basis)
    assert "not the one that this run was trained with" in refused(1, run, "--to", "merged").flat
    basis.unlink()
    assert "basis" in refused(1, run, "--to", "adapter").flat
    other = data_folder(tmp_path / "other")
    for name in ("train.csv", "validation.csv"):
        path = other / name
        path.write_text(path.read_text().replace(",low", ",deep"))
    outcome = refused(2, runs(*STATIC), f"task.path={other}", "--to", "merged")
    assert "deep" in outcome.flat and "expected the labels of this run" in outcome.flat


def test_adapter_of_another_run_is_refused(runs: Runs, copy: Copy, refused: Refused) -> None:
    run = copy(runs("method=lora", "method.rank=3", "method.alpha=5"))
    other = runs("method=lora", "method.rank=3", "method.alpha=50", "seed=7")
    shutil.copy(adapter_path(other), run / "adapter")
    assert "belongs to another run" in refused(1, run, "--to", "merged").flat


# --- hostile adapters


def damaging(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Return a change to the tensors of a run's adapter that keeps its metadata."""

    def damage_file(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)

    return damage_file


def put(name: str, place: int, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1).__setitem__(place, value)


def set_to(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1]


HOSTILE: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "support beyond the core": (STATIC, put(f"{UP}.support", -1, 49), "outside its 49 entries"),
    "support negative": (STATIC, put(f"{UP}.support", 0, -1), "outside its 49 entries"),
    "support twice": (
        STATIC,
        lambda t: t[f"{UP}.support"].__setitem__(1, t[f"{UP}.support"][0]),
        "do not ascend",
    ),
    "support of one": (STATIC, set_to(f"{UP}.support", lambda t: t[:1]), "got (1,)"),
    "support in float": (STATIC, set_to(f"{UP}.support", Tensor.float), "got torch.float32"),
    "NaN": (STATIC, put(f"{UP}.values", 0, float("nan")), "not finite"),
    "infinity in the head": (STATIC, put("classifier.bias", 0, float("inf")), "not finite"),
    "a tensor gone": (STATIC, lambda t: t.pop("classifier.bias"), "classifier.bias is missing"),
    "a tensor more": (
        STATIC,
        lambda t: t.update({"bert.pooler.dense.bias": torch.zeros(16)}),
        "bert.pooler.dense.bias does not belong",
    ),
    "head transposed": (STATIC, set_to("classifier.weight", lambda t: t.T), "got (16, 2)"),
    "entries beyond the matrix": (SPARSE, put(f"positions/{UP}", -1, 640), "outside its 640"),
    "entries negative": (SPARSE, put(f"positions/{UP}", 0, -640), "outside its 640"),
    "entries more than values": (
        SPARSE,
        set_to(f"values/{UP}", shorter),
        "positions for",
    ),
    "entries in two dimensions": (
        SPARSE,
        set_to(f"positions/{UP}", lambda t: t[None]),
        "got (1,",
    ),
    "values in whole numbers": (SPARSE, set_to(f"values/{UP}", Tensor.long), "torch.int64"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_adapter_is_refused(case: str, runs: Runs, copy: Copy, refused: Refused) -> None:
    overrides, change, says = HOSTILE[case]
    run = copy(runs(*overrides))
    damaging(change)(run / "adapter" / "adapter.safetensors")
    assert says in refused(1, run, "--to", "merged").flat


def test_damaged_file_is_refused(runs: Runs, copy: Copy, refused: Refused) -> None:
    run = copy(runs(*STATIC))
    path = run / "adapter" / "adapter.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refused(1, run, "--to", "lora").flat
    path.write_bytes(b"\x80\x04not a safetensors file")
    assert "cannot be read" in refused(1, run, "--to", "lora").flat


# --- the check, and the place


def test_difference_over_the_tolerance_leaves_no_files(
    runs: Runs, refused: Refused, tmp_path: Path
) -> None:
    """A core that is rotated back rounds differently, so logits differ in the last bits."""
    run = runs("method.form=rotated", "method.density=0.05")
    outcome = refused(1, run, "--to", "merged", "-o", str(tmp_path / "m"), "--tolerance", "0")
    assert "at most 0, got" in outcome.flat
    assert not (run / "export-merged").exists()


def test_previous_export_is_kept_until_the_new_one_has_passed(
    runs: Runs, refused: Refused, cli: Cli, tmp_path: Path
) -> None:
    run = runs("method.form=rotated", "method.density=0.05")
    folder = tmp_path / "m"
    target = ("--to", "merged", "-o", str(folder))
    assert cli("export", str(run), *target).code == 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "--overwrite" in refused(2, run, *target).flat
    refused(1, run, *target, "--overwrite", "--tolerance", "0")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (folder / "left from before").touch()
    again = cli("export", str(run), *target, "--overwrite", "--check-examples", "3")
    assert again.code == 0, again.err
    assert {p.name for p in folder.iterdir()} == set(before)
    assert json.loads((folder / "export.json").read_text())["check"]["examples"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_folders_without_an_export_are_not_replaced(
    runs: Runs, copy: Copy, refused: Refused, tmp_path: Path
) -> None:
    run = copy(runs(*STATIC))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    (tmp_path / "file").touch()
    for place, says in (
        (tmp_path / "thesis", "something other than an export"),
        (tmp_path / "file", "is a file"),
        (run, "contains what the export is made from"),
        (run.parent, "contains what the export is made from"),
        (run / "adapter", "something other than an export"),
        (tmp_path / "file" / "deeper", ""),
    ):
        code = 1 if place.name == "deeper" else 2
        outcome = refused(code, run, "--to", "adapter", "-o", str(place), "--overwrite")
        assert says in outcome.flat
    assert "not empty" in refused(2, run, "--to", "adapter", "-o", str(tmp_path / "thesis")).flat


def test_base_model_is_never_overwritten_by_its_export(
    cli: Cli, refused: Refused, tmp_path: Path
) -> None:
    """The base model is an earlier export, which --overwrite must not replace."""
    base, data = base_folder(tmp_path / "base"), data_folder(tmp_path / "data")
    first = train(tmp_path / "first", base, data, "method=full", "train.max_steps=1")
    assert cli("export", str(first), "--to", "merged", "-o", str(tmp_path / "m")).code == 0
    second = train(tmp_path / "second", tmp_path / "m", data, "method=full", "train.max_steps=1")
    arguments = ("--to", "merged", "-o", str(tmp_path / "m"), "--overwrite")
    assert "is made from" in refused(2, second, *arguments).flat


# --- runs that were stopped


def test_stopped_run_is_exported_from_its_checkpoint(
    runs: Runs, refused: Refused, cli: Cli, tmp_path: Path
) -> None:
    run = runs(*STATIC, stop=True)
    outcome = cli("export", str(run), "--to", "merged", "-o", str(tmp_path / "m"))
    assert outcome.code == 0, outcome.err
    assert "interrupted" in outcome.flat and "checkpoint-6" in outcome.flat
    said = json.loads((tmp_path / "m" / "export.json").read_text())
    assert said["source"] == "checkpoint-6" and "checkpoint-6" in said["notes"][0]
    loss = answers(by_transformers(tmp_path / "m"), tokenizer_of(run))[1]
    assert loss == pytest.approx(record(run)["metrics"]["final"]["loss"], abs=2e-5)
    own = cli("export", str(run), "--to", "adapter", "-o", str(tmp_path / "a"), "--tolerance", "0")
    assert own.code == 0, own.err
    listed = refused(2, runs(*SPARSE, stop=True), "--to", "adapter", "-o", str(tmp_path / "b"))
    assert "known only when it has finished" in listed.flat


def test_stopped_run_is_exported_from_its_best_checkpoint(
    runs: Runs, copy: Copy, cli: Cli, refused: Refused, tmp_path: Path
) -> None:
    many = ("train.save_total_limit=5", "train.load_best_model_at_end=true")
    run = copy(runs(*STATIC, *many, stop=True))
    state = json.loads((run / "checkpoint-6" / "state.json").read_text())
    for best in (3, 6):
        state["progress"]["best_step"] = best
        (run / "checkpoint-6" / "state.json").write_text(json.dumps(state))
        (run / "checkpoint-6" / "manifest.json").unlink()
        seal(run / "checkpoint-6", "its recipe")
        place = str(tmp_path / f"m{best}")
        outcome = cli("export", str(run), "--to", "lora", "-o", place)
        assert outcome.code == 0, outcome.err
        assert f"its best checkpoint, checkpoint-{best}, is used" in outcome.flat
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    nothing = refused(2, run, "--to", "merged")
    assert (
        "neither an adapter nor a whole checkpoint" in nothing.flat and "--resume" in nothing.flat
    )
