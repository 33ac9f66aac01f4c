"""Resume in damaged or foreign folders is refused or handled, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.survival_runs import Workspace, flat, record, weights

from sparsegrad_cli.cli.arguments import load
from sparsegrad_cli.errors import FileFormatError, RecipeError, UsageError
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.restore.run_files import open_run
from sparsegrad_cli.run.checkpoints import MANIFEST, seal, with_check
from sparsegrad_cli.run.resume import check_resumable

METHOD = "core static"


@pytest.fixture
def run(workspace: Workspace) -> Path:
    """Copy a run that was killed after checkpoint-4, with checkpoint-2 still present."""
    folder = workspace.place / "killed"
    if not folder.is_dir():
        kill = {"point": "checkpoint-renamed", "count": 2}
        assert workspace.train(METHOD, folder, **kill).code == -9
        assert sorted(p.name for p in folder.glob("checkpoint-*")) == [
            "checkpoint-2",
            "checkpoint-4",
        ]
    mine = workspace.new_run()
    shutil.copytree(folder, mine)
    return mine


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_damaged_checkpoint_is_named_and_the_previous_one_used(
    workspace: Workspace, run: Path
) -> None:
    torn = run / "checkpoint-4" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 0, ended.err
    assert "note: checkpoint-4 is damaged: optimizer.safetensors has 100 bytes, expected" in flat(
        ended
    )
    assert "note: checkpoint-2 is used" in flat(ended)
    assert record(run)["resumed_from"] == 2
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))


def test_damage_to_the_only_checkpoint_restarts_the_run(workspace: Workspace, run: Path) -> None:
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-4" / MANIFEST).unlink()
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 0 and "no whole checkpoint is left" in flat(ended)
    assert record(run)["resumed_from"] == 0
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))
    steps = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(2) == 1


def test_damaged_basis_is_computed_again(workspace: Workspace, run: Path) -> None:
    basis = run / "basis.safetensors"
    basis.write_bytes(basis.read_bytes()[:-20])
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 0 and "basis.safetensors is made again" in flat(ended)
    assert record(run)["resumed_from"] == 4
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))


def test_checkpoint_of_another_basis_is_refused(workspace: Workspace, run: Path) -> None:
    other = workspace.new_run()
    assert workspace.train(METHOD, other, "seed=7", point="calibrated").code == -9
    shutil.copy(other / "basis.safetensors", run / "basis.safetensors")
    before = content(run)
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 1 and "was trained in another basis" in flat(ended)
    left = content(run)
    assert {name: left[name] for name in before if "checkpoint" in name} == {
        name: before[name] for name in before if "checkpoint" in name
    }


def test_checkpoint_of_other_data_is_refused(workspace: Workspace, run: Path) -> None:
    """The data file was changed under the same name."""
    state = json.loads((run / "checkpoint-4" / "state.json").read_text())
    facts = record(run)
    assert state["origins"]["data"] == facts["hashes"]["data"]
    assert state["origins"]["model"] == facts["model"]["fingerprint"]
    rows = workspace.data / "train.csv"
    good = rows.read_text()
    head, first, *rest = good.splitlines()
    rows.write_text("\n".join([head, *rest, first]))
    try:
        ended = workspace.train(METHOD, run, "--resume")
    finally:
        rows.write_text(good)
    assert ended.code == 1 and "checkpoint-4 was trained on other data" in flat(ended)
    # The basis depends on the data: it is computed for the other data, and again for the first.
    assert "basis.safetensors is made again" in flat(ended)
    assert workspace.train(METHOD, run, "--resume").code == 0
    assert record(run)["resumed_from"] == 4
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))


def test_resume_with_another_recipe_is_refused(workspace: Workspace, run: Path) -> None:
    before = content(run)
    ended = workspace.train(METHOD, run, "--resume", "train.learning_rate=1e-3")
    assert ended.code == 2 and "was started with another recipe" in flat(ended)
    assert content(run) == before


def test_checkpoint_of_another_recipe_is_refused(workspace: Workspace, run: Path) -> None:
    """A copied checkpoint would load, but belongs to another run."""
    seal_anew(run / "checkpoint-4", recipe="f" * 64)
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 2 and "checkpoint-4 belongs to another recipe" in flat(ended)
    assert (run / "checkpoint-2").is_dir() and (run / "checkpoint-4").is_dir()
    shutil.rmtree(run / "checkpoint-4")  # as the message says
    assert workspace.train(METHOD, run, "--resume").code == 0
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))


def seal_anew(folder: Path, recipe: str) -> None:
    (folder / MANIFEST).unlink()
    seal(folder, recipe)


def test_checkpoint_of_another_version_is_refused(workspace: Workspace, run: Path) -> None:
    path = run / "checkpoint-4" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["check"]
    manifest |= {"format": 2, "versions": {"sparsegrad": "7.0.0"}}
    path.write_text(json.dumps(with_check(manifest)))
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 1
    assert "format 2, written by sparsegrad 7.0.0; this version reads format 1" in flat(ended)
    assert (run / "checkpoint-2").is_dir() and (run / "checkpoint-4").is_dir()


def test_checkpoint_with_wrong_tensors_is_refused(workspace: Workspace, run: Path) -> None:
    path = run / "checkpoint-4" / "trainable.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"] = tensors["classifier.bias"].repeat(2)
    save_file(tensors, path)
    seal_anew(run / "checkpoint-4", recipe=record(run)["recipe_digest"])
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 1 and "does not fit this recipe: classifier.bias" in flat(ended)


def test_damaged_or_newer_record_is_refused_and_a_damaged_one_can_be_moved_aside(
    workspace: Workspace, run: Path
) -> None:
    good = json.loads((run / "run.json").read_text())
    advice = {"{": f"mv {run}/run.json {run}/run.json.damaged"}
    advice[json.dumps(good | {"schema": 9})] = "install the sparsegrad that wrote it"
    for text, fix in advice.items():
        (run / "run.json").write_text(text)
        with pytest.raises(FileFormatError) as reported:  # what report and export say
            load_run(run)
        ended = workspace.train(METHOD, run, "--resume")
        assert ended.code == 1 and fix in str(reported.value.fix)
        assert str(reported.value.fix).replace(" ", "") in flat(ended).replace(" ", "")
        assert "overwrite" not in flat(ended) and "remove" not in flat(ended)
        assert (run / "checkpoint-4").is_dir()
    (run / "run.json").rename(run / "run.json.damaged")  # as the message says
    assert workspace.train(METHOD, run, "--resume").code == 0
    assert record(run)["resumed_from"] == 4
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))


def test_damaged_recipe_file_is_refused(workspace: Workspace, run: Path) -> None:
    (run / "run.json").unlink()
    (run / "recipe.yaml").write_text("train: [")
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 1 and "recipe.yaml is damaged" in flat(ended)
    (run / "recipe.yaml").unlink()
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 2 and "holds no run to resume" in flat(ended)
    assert (run / "checkpoint-4").is_dir()


def test_changed_or_missing_recipe_file_can_be_written_again(
    workspace: Workspace, run: Path
) -> None:
    """The digest in run.json says whether a recipe is the one that the run was started with."""
    recipe = run / "recipe.yaml"
    recipe.write_text(
        "\n".join(recipe.read_text().splitlines()[:9])
    )  # still YAML, but the rest is missing
    before = content(run)
    with pytest.raises(UsageError, match="is not the recipe that the run") as caught:
        check_resumable(run, load_recipe(recipe, data=False).recipe)
    assert "from a copy" in str(caught.value.fix) and content(run) == before
    recipe.write_text("train: {learning")  # cut within a line
    with pytest.raises(RecipeError, match=r"not valid YAML.*restore .*from a copy"):
        load([str(run)], None)
    recipe.unlink()
    with pytest.raises(FileFormatError, match=r"has no recipe\.yaml") as missing:
        load([str(run)], None)
    assert missing.value.fix == caught.value.fix
    with pytest.raises(FileFormatError, match=r"has no recipe\.yaml"):
        open_run(run)
    assert workspace.train(METHOD, run, "--resume").code == 0  # as the message says
    assert digest(load_recipe(recipe, data=False).recipe) == record(run)["recipe_digest"]
    assert record(run)["resumed_from"] == 4


def test_run_without_its_best_checkpoint_starts_before_it(workspace: Workspace, run: Path) -> None:
    """A run that ends with its best checkpoint resumes from before the missing best."""
    shutil.rmtree(run)
    assert workspace.train(METHOD, run, point="trained").code == -9
    shutil.rmtree(run / "checkpoint-4")
    ended = workspace.train(METHOD, run, "--resume")
    assert ended.code == 0
    assert "checkpoint-8 is damaged: its best checkpoint, checkpoint-4" in flat(ended)
    assert weights(run) == weights(workspace.uninterrupted_run(METHOD))
