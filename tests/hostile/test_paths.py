"""Links and paths in untrusted folders: nothing outside a run is written or deleted."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import strategies as st
from support.answered_study import answers_record, cell_entry, save_answers
from support.hostile_cases import check_error, folder_content, property_test, scratch_folder
from support.hostile_folders import fill_folder, folder_entries
from support.html_pages import without_figures
from support.record_samples import compare_record, run_record

from sparsegrad_cli.cli.report import report
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.generate.answer_files import answer_files
from sparsegrad_cli.generate.options import GenerateOptions, ModelOptions
from sparsegrad_cli.io.atomic import write_json_atomic, write_text_atomic
from sparsegrad_cli.judge.judge_answers import JudgeOptions
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe, to_yaml
from sparsegrad_cli.recipe.study import make_study
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.restore.run_files import open_run
from sparsegrad_cli.run.folder import lock_folder, prepare_folder
from sparsegrad_cli.study.folder import StudyFolder
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

RUN_NAMES = (
    *("run.json", "recipe.yaml", "steps.jsonl", "report.html", "report.md", "basis.safetensors"),
    *("adapter", "model", "answers", "checkpoint-1", "checkpoint-x", "export-lora", "checkpoint-"),
    *("export-merged", "thesis.txt", ".lock"),
)
STUDY_NAMES = (
    "compare.json",
    "report.html",
    "report.md",
    "report.tex",
    "cells",
    "answers",
    "tuning",
    "tuning.db",
    "tuning.journal",
    "tuning.journal.lock",
    "slurm",
    ".lock",
    "x.txt",
)
CELLS = (*("cells/glue-rte-lora-s42", "cells/glue-rte-lora-s3705", "cells/glue-rte-lora-s42.yaml"),)


@property_test(
    "links in a run's folder, train --overwrite", found=folder_entries(*RUN_NAMES), many=500
)
def test_overwrite_of_a_run_keeps_linked_files(found: dict[str, str]) -> None:
    """Training afterwards writes inside the folder only."""
    recipe = load_recipe(None).recipe
    with scratch_folder() as folder:
        run = folder / "run"
        run.mkdir()
        fill_folder(run, found)
        before = folder_content(folder / "outside")
        try:
            with lock_folder(run):
                prepare_folder(run, recipe, resume=False, overwrite=True)
                record = RunWriter(run, command="train")
                record.save()
            with (run / "steps.jsonl").open("a") as steps:
                steps.write("{}\n")
            with contextlib.suppress(OSError):  # a foreign file of that name stays
                (run / "adapter").mkdir(exist_ok=True)
                (run / "adapter" / "adapter.safetensors").write_text("x")
            for name in ("report.html", "report.md"):
                write_text_atomic(run / name, "x")
            if found.get("thesis.txt") in ("folder", "file"):
                assert (run / "thesis.txt").exists()
        finally:
            assert folder_content(folder / "outside") == before


@property_test(
    "links in a run's folder, report", found=folder_entries(*RUN_NAMES[1:5]), many=200, few=5
)
def test_report_of_a_run_keeps_linked_files(found: dict[str, str]) -> None:
    with scratch_folder() as folder:
        run = folder / "run"
        run.mkdir()
        fill_folder(run, found)
        before = folder_content(folder / "outside")
        write_json_atomic(run / "run.json", run_record() | {"output_dir": "../outside"})
        try:
            with contextlib.redirect_stdout(io.StringIO()), without_figures(drawing=False):
                report([run])
            pages = [run / "report.md", run / "report.html"]
            # Where a page cannot replace what has its name, a note says so, and none is written.
            if not any(page.is_dir() and not page.is_symlink() for page in pages):
                assert not any(page.is_symlink() for page in pages)
        finally:
            assert folder_content(folder / "outside") == before


@property_test(
    "links in a comparison's folder, compare",
    found=folder_entries(*STUDY_NAMES, *CELLS),
    overwrite=st.booleans(),
)
def test_comparison_folder_with_links(found: dict[str, str], overwrite: bool) -> None:
    """With --overwrite links go and what they name stays; without, cells that are links are not
    run in."""
    study = make_study(None, ("lora",), 2, ("task=glue/rte", "method.density=0.01"))
    with scratch_folder() as folder:
        place = folder / "study"
        place.mkdir()
        fill_folder(place, {"compare.json": "", **found})
        if (place / "compare.json").is_symlink():
            (place / "compare.json").unlink()
            write_json_atomic(place / "compare.json", compare_record() | {"cells": []})
        before = folder_content(folder / "outside")
        try:
            opened = StudyFolder(place)
            with opened.held(overwrite=overwrite):
                opened.begin(lambda: study, overwrite=overwrite)
            for one in study.cells:
                opened.cell(one).mkdir(parents=True, exist_ok=True)
                (opened.cell(one) / "run.json").write_text("{}")
                write_text_atomic(opened.cell(one).with_suffix(".yaml"), "x")
            (place / "tuning.journal").touch()
            with contextlib.suppress(FileExistsError):  # a foreign file, and nothing is tuned
                (place / "tuning").mkdir(exist_ok=True)
                (place / "tuning" / "x").touch()
        finally:
            assert folder_content(folder / "outside") == before


@pytest.mark.parametrize("where", ["../outside", "/etc", "cells/link", "answers/../../outside"])
def test_comparison_does_not_load_runs_outside_its_folder(where: str) -> None:
    """Runs that compare.json places elsewhere are not loaded."""
    from sparsegrad_cli.generate.answer_study import answer_study

    with scratch_folder() as folder:
        place = folder / "study"
        (place / "cells").mkdir(parents=True)
        fill_folder(place, {})
        (place / "cells" / "link").symlink_to(folder / "outside")
        run = run_record() | {"task": {"kind": "chat"}, "status": "done"}
        cells = [cell_entry("lora", 1, run) | {"run_dir": where}]
        write_json_atomic(place / "compare.json", compare_record() | {"cells": cells})
        before = folder_content(folder / "outside")
        model = ModelOptions(str(place))
        options = GenerateOptions(model, GenerationSettings(), "builtin:questions", None, 4, None)
        with pytest.raises(UsageError, match="outside") as caught:
            answer_study(options, options.read_questions(), Observer())
        check_error(caught.value)
        assert folder_content(folder / "outside") == before


def test_answers_are_not_written_through_links() -> None:
    from sparsegrad_cli.generate.answer_study import answer_study

    with scratch_folder() as folder:
        place = folder / "study"
        place.mkdir()
        fill_folder(place, {"answers": "to a folder"})
        write_json_atomic(place / "compare.json", compare_record())
        before = folder_content(folder / "outside")
        model = ModelOptions(str(place))
        options = GenerateOptions(model, GenerationSettings(), "builtin:questions", None, 4, None)
        with pytest.raises(UsageError, match="is a link"):
            answer_study(options, options.read_questions(), Observer())
        (place / "judge-questions").symlink_to(folder / "outside")
        with pytest.raises(UsageError, match="is a link"):
            assert JudgeOptions((place,), "builtin:questions", "http://x", "m").folder
        assert folder_content(folder / "outside") == before


@pytest.mark.parametrize("name", ["../outside/file", "/etc/hostname", "answers/link"])
def test_answers_outside_a_comparison_are_not_sent_to_a_judge(name: str) -> None:
    """Otherwise a record that names a private file would send its lines to the endpoint."""
    with scratch_folder() as folder:
        place = folder / "study"
        place.mkdir()
        fill_folder(place, {"answers": "folder"})
        (place / "answers" / "link").symlink_to(folder / "outside" / "file")
        made = answers_record({"lora 1": [["a"]]})
        made["columns"][0]["file"] = name
        save_answers(place, made, "questions")
        with pytest.raises(UsageError, match="lies outside"):
            answer_files(place, "builtin:questions")


def test_code_in_a_run_folder_needs_permission_to_run(tmp_path: Path) -> None:
    """recipe.yaml in the folder may allow it, but the user who opens the folder has not."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter.safetensors").touch()
    (run / "model").mkdir()
    recipe = load_recipe(None, (f"model={run / 'model'}", "model.trust_remote_code=true")).recipe
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    write_json_atomic(run / "run.json", {"schema": 1, "command": "train", "status": "done"})
    with pytest.raises(UsageError, match="not run by default") as caught:
        open_run(run)
    assert "model.trust_remote_code=true" in str(caught.value.fix)
    with pytest.raises(FileFormatError, match="incomplete"):  # with permission, it continues
        open_run(run, ("model.trust_remote_code=true",))


def test_export_is_not_written_through_links(exportable: Path, tmp_path: Path) -> None:
    from sparsegrad_cli.export.export_run import export_run
    from sparsegrad_cli.export.forms import ExportOptions

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "export.json").write_text('{"to": "lora"}')
    (exportable / "export-lora").symlink_to(outside)
    before = folder_content(outside)
    for overwrite in (True, False):
        with pytest.raises(UsageError, match="is a link"):
            export_run(exportable, ExportOptions("lora", overwrite=overwrite))
    assert folder_content(outside) == before


@pytest.mark.parametrize("name", ["123", "null", "[red]x[/]", "a #b", "{x", "lr=1e-3", "1e5"])
def test_folder_names_that_look_like_yaml_are_kept(name: str) -> None:
    """Folder names are not parsed as YAML: `a #b` once became `a`, and `123` a number."""
    from sparsegrad_cli.cli.arguments import load

    with scratch_folder() as folder:
        assert load(None, Path(name)).recipe.output_dir == str(Path.cwd() / name)
        run = folder / "runs" / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("seed: 7\noutput_dir: ../outside\n")
        loaded = load([f"runs/{name}"], None).recipe
        assert (loaded.output_dir, loaded.seed) == (str(Path.cwd() / "runs" / name), 7)
        assert load([f"runs/{name}", "output_dir=y"], None).recipe.output_dir == str(
            Path.cwd() / "y"
        )
