"""What generated cases found of runs that go on, each as small as it goes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostility import check_error, no_hang, tree
from little import record
from snares import furnish
from stopped import quick, resumed, seal_anew, stopped

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import BEFORE, PARTIAL, REMOVED
from sparsegrad_cli.io.locks import owner_of
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.run.checkpoint_manifest import MANIFEST, check_ours, checked, damage
from sparsegrad_cli.run.checkpoints import Shelf, best_of
from sparsegrad_cli.run.folder import lock_folder
from sparsegrad_cli.training.callbacks import RecordCallback


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The stopped run, to be spoilt."""
    return Path(shutil.copytree(stopped().run, tmp_path / "run"))


def change(run: Path, name: str, changes: Any) -> None:
    """Put other values into a checkpoint's JSON, and seal it."""
    path = run / "checkpoint-3" / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(changes(data)))
    seal_anew(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_step", "3"),
        ("global_step", -3),
        ("max_steps", None),
        ("num_train_epochs", 1.5),
        ("epoch", [0.5]),
        ("train_batch_size", "8"),
        ("total_flos", {}),
        ("best_metric", "high"),
        ("log_history", 3),
        ("log_history", True),
        ("stateful_callbacks", []),
    ],
)
def test_a_state_of_another_kind(run: Path, key: str, value: Any) -> None:
    """transformers takes it as it is, and stumbles after the first step."""
    change(run, "trainer_state.json", lambda state: state | {key: value})
    with pytest.raises(FileFormatError, match=f"{key} cannot be") as caught:
        resumed(run)
    assert "take the checkpoint away" in check_error(caught.value)
    assert str(caught.value.where).endswith("checkpoint-3/trainer_state.json")


@pytest.mark.parametrize(
    "measured",
    [
        *(None, [], {"train_s": "1"}, {"train_s": -1}, {"train_s": 1e300}),
        *({"steps_s": "ab"}, {"steps_s": [[]]}, {"memory": 3}),
    ],
)
def test_times_that_are_none(run: Path, measured: Any) -> None:
    """They are added to once training is over: a traceback after hours."""
    change(
        run,
        "state.json",
        lambda state: state | {"extras": state["extras"] | {"measured": measured}},
    )
    with pytest.raises(FileFormatError, match=r"its (times are no|memory is no)") as caught:
        resumed(run)
    check_error(caught.value)


@pytest.mark.parametrize("loss", [[["x"], 3], [[0.5], "3"], [[0.5], 1.5], [0.5, 3], [[], 3]])
def test_a_sum_of_losses_that_is_none(run: Path, loss: Any) -> None:
    change(run, "state.json", lambda state: state | {"extras": state["extras"] | {"loss": loss}})
    with pytest.raises(FileFormatError, match="is incomplete") as caught:
        resumed(run)
    check_error(caught.value)


def test_a_manifest_nested_deeper_than_any(run: Path) -> None:
    (run / "checkpoint-3" / MANIFEST).write_text("[" * 5000)
    assert damage(run / "checkpoint-3") == f"{MANIFEST} is damaged"
    assert record(resumed(run))["resumed_from"] == 0


def test_a_manifest_whose_versions_are_no_record(run: Path) -> None:
    path = run / "checkpoint-3" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["check"]
    path.write_text(json.dumps(checked(manifest | {"versions": ["\x1b[2J" * 3000]})))
    notes = check_ours(run / "checkpoint-3", manifest["recipe"])
    assert len(notes) == 1 and "sparsegrad None then" in notes[0]


@pytest.mark.parametrize("best", ["", "/", "..", "checkpoint-²", "checkpoint-1/..", "x\0", 3, None])
def test_a_best_checkpoint_that_is_none(run: Path, best: Any) -> None:
    """``with_name("")`` is a ValueError."""
    change(run, "trainer_state.json", lambda state: state | {"best_model_checkpoint": best})
    assert best_of(run / "checkpoint-3") is None
    assert Shelf(run, record(run)["recipe_digest"], limit=2, keep_best=True).find(print)


LINES = (
    *(
        "[" * 5000,
        "7",
        '{"step": "x"}',
        '{"step": 1e999}',
        '{"step": [1]}',
        '{"loss": 1}',
        "\udcff",
    ),
    *('{"step": 1, "eval": []}', '{"step": 1, "eval": {"step": 1}}', '{"step": 1, "loss": "x"}'),
    *(
        '{"step": 1, "loss": 1}',
        '{"step": 1, "eval": {"step": 1, "score": null}}',
        '{"step": 1, "l',
    ),
)


def test_lines_of_a_log_that_no_run_writes(tmp_path: Path) -> None:
    """They are cut from it as half a line is, and what stands between them is kept."""
    whole = [{"step": 2, "eval": {"step": 2, "score": 0.5}}]
    whole += [{"step": 3, "epoch": 1.0, "loss": 0.5, "learning_rate": 0.1}, {"step": 4}]
    path = tmp_path / "steps.jsonl"
    text = "\n".join([*LINES, *map(json.dumps, whole), *LINES])
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    callback = RecordCallback(tmp_path, Observer(), [])
    callback.cut(3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole[:2]
    assert callback.history == [whole[0]["eval"]] and callback.train_log == [whole[1]]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_log_that_is_no_file(run: Path, kind: str) -> None:
    (run / "steps.jsonl").unlink()
    furnish(run, {"steps.jsonl": kind})
    with no_hang(), pytest.raises(UsageError, match="is not a file") as caught:
        resumed(run)
    check_error(caught.value)


def test_pipes_where_a_killed_write_would_leave_folders(run: Path) -> None:
    """rmtree opens them, and waits for somebody to write."""
    left = [f"checkpoint-{n}{ending}" for n in (3, 6) for ending in (PARTIAL, BEFORE, REMOVED)]
    furnish(run, dict.fromkeys(left, "pipe"))
    with no_hang():
        resumed(run)
    assert not [name for name in left if (run / name).exists()]


def test_an_adapter_is_not_written_through_what_a_kill_would_leave(run: Path) -> None:
    """The library that writes tensors follows a link, and makes the file that it names."""
    furnish(run, {"adapter": "folder"})
    outside = run.parent / "outside"
    for number, ending in enumerate((PARTIAL, PARTIAL + ".mode", "")):
        (run / "adapter" / f"adapter.safetensors{ending}").symlink_to(outside / f"new-{number}")
    before = tree(outside)
    resumed(run)
    assert tree(outside) == before
    assert (run / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    "words", ["[" * 4000, '{"pid": 1e999, "host": "", "since": ""}', "\0", "7"]
)
def test_a_lock_that_says_anything(run: Path, words: str) -> None:
    (run / ".lock").write_text(words)
    assert owner_of(run) is None
    with lock_folder(run):
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
