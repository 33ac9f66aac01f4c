"""Minimal cases of faults that generated inputs have found (recipes: test_yaml_bombs)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli_runs import Cli
from support.hostile_cases import check_error, check_harmless
from support.html_pages import without_figures
from support.record_samples import run_record
from support.task_data import load_task
from support.tensor_file_uses import (
    adapter,
    basis_bytes,
    language_model,
    model_folder,
    peft_folder,
    sealed_basis,
    use_adapter,
    use_basis,
)
from torch import Tensor

from sparsegrad_cli.errors import DataError, DiskError, FileFormatError, UsageError
from sparsegrad_cli.generate.peft_folder import base_of, load_onto
from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.methods.peft_folder import TENSORS
from sparsegrad_cli.models.pretrained import load_configuration
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.study import LoadedStudy, make_study
from sparsegrad_cli.study.folder import StudyFolder
from sparsegrad_cli.study.runs import can_resume, is_done

# --- tensors


def changed_basis(path: Path, change: Any, **said: str) -> Path:
    """Write the basis with changed tensors and matching digests."""
    path.write_bytes(basis_bytes())
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    kept = {key: value for key, value in metadata.items() if key not in ("digest", "check")}
    sealed_basis(path, tensors, kept | said)
    return path


def every(kind: str, change: Any) -> Any:
    """Return a change to all tensors whose names start with ``kind``."""

    def changed(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(kind)]:
            tensors[name] = change(tensors[name]).contiguous()

    return changed


def test_undamaged_basis_is_accepted(tmp_path: Path) -> None:
    use_basis(changed_basis(tmp_path / "b", lambda tensors: None))
    use_basis(changed_basis(tmp_path / "b", every("score/", Tensor.double)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (every("q_out/", lambda q: q[:, 0]), "holds no directions"),
        (every("q_in/", lambda q: q.long()), "holds no directions"),
        (every("q_in/", lambda q: q[:, :0]), "holds no directions"),
        (every("q_out/", lambda q: 0 * q), "not of length one"),
        (every("q_out/", lambda q: q / 0), "not of length one"),
        (every("singular_out/", lambda s: s.sum()), "do not fit"),
        (every("singular_in/", lambda s: s[:3]), "do not fit"),
        (every("singular_in/", lambda s: s / 0), "do not fit"),
        (every("score/", lambda s: s[:3]), "does not score a core of 7 x 7"),
        (every("score/", lambda s: s / 0), "does not score"),
    ],
)
def test_basis_with_invalid_tensors_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(FileFormatError, match=says) as caught:
        use_basis(changed_basis(tmp_path / "b", change))
    check_error(caught.value)


@pytest.mark.parametrize("text", ["[" * 3000, "[]", '{"seconds": "x"}', '{"seconds": []}', "7"])
def test_basis_with_invalid_settings_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileFormatError, match="damaged"):
        use_basis(changed_basis(tmp_path / "b", lambda tensors: None, settings=text))


def test_basis_in_half_precision_is_read(tmp_path: Path) -> None:
    """The digest once used numpy, which has no bfloat16."""
    use_basis(changed_basis(tmp_path / "b", every("q_", Tensor.bfloat16)))


def test_adapter_with_scalar_singular_values_is_refused(tmp_path: Path) -> None:
    tensors, settings = adapter()
    tensors = dict(tensors)
    name = next(name for name in tensors if name.startswith("basis/singular_in/"))
    tensors[name] = tensors[name].sum()
    with pytest.raises(FileFormatError, match="do not fit"):
        use_adapter(tmp_path, tensors, settings)


def lora(place: Path, change: Any = lambda tensors: None, **config: Any) -> Path:
    """Copy the LoRA folder with other tensors and settings."""
    folder = Path(shutil.copytree(peft_folder() / "lora", place / "lora"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(min(t)), "is missing"),
        (lambda t: t.update({min(t).replace("lora_A", "lora_C"): torch.ones(2)}), "not belong"),
        (lambda t: t.update({min(t): torch.ones(3, 3)}), "peft cannot load it"),
        (lambda t: t[min(t)].view(-1)[0:1].fill_(float("nan")), "not finite"),
    ],
)
def test_peft_folder_with_wrong_tensors_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    """peft initialises missing tensors and only warns."""
    with pytest.raises(FileFormatError, match=says) as caught:
        load_onto(copy.deepcopy(language_model()), lora(tmp_path, change))
    check_error(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"revision": 3}, "names no base model"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": " "}, "names no base model"),
        ({"megatron_config": {}, "megatron_core": "megatron.os"}, "Megatron"),
    ],
)
def test_peft_folder_with_wrong_settings_is_refused(tmp_path: Path, config: Any, says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        base_of(lora(tmp_path, **config))


def test_peft_pickle_is_not_read(tmp_path: Path) -> None:
    folder = lora(tmp_path)
    (folder / TENSORS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="no other format is read"):
        base_of(folder)


@pytest.mark.parametrize("values", [{"hidden_size": "16"}, {"use_cache": "x"}])
def test_model_configuration_with_wrong_types_is_refused(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_configuration(ModelSection(name=str(folder)))


# --- records


@pytest.mark.parametrize(
    "keys",
    [("memory", "phases"), ("calibration", "energy", "mean_by_kind"), ("precision", "weights")],
)
def test_escape_codes_in_keys_are_shown_as_text(
    cli: Cli, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Names of phases, kinds and packages were once printed unescaped."""
    record = copy.deepcopy(run_record())
    inner = record
    for key in keys:
        inner = inner[key]
    inner["\x1b[31mred\x07"] = copy.deepcopy(next(iter(inner.values())))
    write_json_atomic(tmp_path / "run.json", record)
    with without_figures(drawing=False):
        outcome = cli("report", str(tmp_path))
    assert outcome.code == 0
    check_harmless(outcome.out)
    for name in ("report.md", "report.html"):
        assert "\x1b" not in (tmp_path / name).read_text()


@pytest.mark.parametrize("step", ["²", "٣", "9" * 5000, "-1", "1e3"])
def test_steps_that_are_not_numbers_are_refused(cli: Cli, tmp_path: Path, step: str) -> None:
    """``"²".isdigit()`` is True, but int("²") raises ValueError."""
    write_json_atomic(tmp_path / "run.json", run_record() | {"hashes": {"order": {step: "x"}}})
    outcome = cli("report", str(tmp_path))
    assert outcome.code == 1 and "hashes.order." in outcome.err
    check_harmless(outcome.err)


def test_deeply_nested_record_is_refused(cli: Cli, tmp_path: Path) -> None:
    for depth in (150, 900, 100_000):
        (tmp_path / "run.json").write_text('{"schema": 1, "x": ' + "[" * depth + "]" * depth + "}")
        outcome = cli("report", str(tmp_path))
        assert outcome.code == 1 and "nested more than 100 levels deep" in outcome.flat
    assert plain_json('{"a": [NaN, {"b": [1e999]}]}') == {"a": [None, {"b": [float("inf")]}]}


# --- folders


def open_study(study: LoadedStudy, folder: Path, *, overwrite: bool = False) -> None:
    """Open a study folder as compare does."""
    place = StudyFolder(folder)
    with place.held(overwrite=overwrite):
        place.begin(lambda: study, overwrite=overwrite)


def test_file_in_place_of_the_cells_folder_is_refused(tmp_path: Path) -> None:
    study = make_study(None, ("lora",), 1, ("method.density=0.01",))
    (tmp_path / "compare.json").write_text('{"schema": 1, "cells": []}')
    (tmp_path / "cells").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DiskError, match="cannot be written") as caught:
            open_study(study, tmp_path, overwrite=overwrite)
        check_error(caught.value)
    assert (tmp_path / "cells").read_text() == "mine"


def test_file_in_place_of_a_run_folder_is_refused(tmp_path: Path) -> None:
    """This once ended in a traceback, since the process of the run could not start."""
    study = make_study(None, ("lora",), 1, ("method.density=0.01",))
    cell = StudyFolder(tmp_path).cell(study.cells[0])
    cell.parent.mkdir()
    cell.write_text("mine")
    (tmp_path / "compare.json").write_text('{"schema": 1, "cells": []}')
    with pytest.raises(UsageError, match="is a file, not a folder"):
        open_study(study, tmp_path)
    assert cell.read_text() == "mine"
    open_study(study, tmp_path, overwrite=True)


@pytest.mark.parametrize("run", [{}, {"status": []}, {"status": "done", "x": 1}])
def test_runs_with_incomplete_records_are_run_again(tmp_path: Path, run: dict[str, Any]) -> None:
    study = make_study(None, ("lora",), 1, ("method.density=0.01",))
    recipe, folder = study.cells[0].loaded.recipe, StudyFolder(tmp_path).cell(study.cells[0])
    folder.mkdir(parents=True)
    write_json_atomic(folder / "run.json", {"schema": 1, **run})
    assert not is_done(recipe, folder) and not can_resume(recipe, folder)


def test_study_with_damaged_runs_is_refused(tmp_path: Path) -> None:
    study = make_study(None, ("lora",), 1, ("method.density=0.01",))
    damaged: list[Any] = [[3], [{}], [{"status": "done", "run": 3}]]
    for cells in damaged:
        write_json_atomic(tmp_path / "compare.json", {"schema": 1, "cells": cells})
        with pytest.raises(FileFormatError, match="is damaged"):
            open_study(study, tmp_path)


# --- data


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('{"text": "a", "label": 1%s}\n{"text": "b", "label": 0.5}' % ("0" * 400), "too large"),
        ('{"text": "a", "label": 1e300}\n{"text": "b", "label": 0.5}', "too large"),
        ('{"text": "a", "label": "1e400"}\n{"text": "b", "label": "0.5"}', "too large"),
        ('{"text": "\\ud800", "label": 0}\n{"text": "b", "label": 1}', "half of a character"),
    ],
)
def test_unusable_labels_and_texts_are_refused(tmp_path: Path, rows: str, says: str) -> None:
    (tmp_path / "d.jsonl").write_text(rows)
    with pytest.raises(DataError, match=says) as caught:
        load_task("json", path=tmp_path / "d.jsonl")
    assert "d.jsonl:1" in str(caught.value.where)
