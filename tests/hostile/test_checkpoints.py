"""Hostile checkpoints: --resume uses another one, starts again, or reports what is wrong.

The tests check only what a user sees, not the format of a checkpoint.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.hostile_cases import folder_content, property_test, scratch_folder
from support.hostile_folders import fill_folder, folder_entries
from support.hostile_tensors import Damages, damage_tensors, damaged_files, damages
from support.hostile_text import json_values, positions
from support.stopped_run import reseal, resume_copy, stopped_run, with_stopped_run

from sparsegrad_cli.run.checkpoints import MANIFEST, with_check


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with with_stopped_run():
        yield


def names() -> list[str]:
    """Return the files of the checkpoint and the other files that resuming reads."""
    inside = sorted(p.name for p in (stopped_run().run / "checkpoint-3").iterdir())
    return [*(f"checkpoint-3/{name}" for name in inside), "basis.safetensors", "steps.jsonl"]


@st.composite
def damaged_checkpoints(draw: st.DrawFn) -> tuple[str, bytes | Damages, bool]:
    """Draw (file, content or damages to its tensors, whether the manifest matches)."""
    name = draw(st.sampled_from(names()))
    path = stopped_run().run / name
    content = path.read_bytes()
    fits = name.startswith("checkpoint") and bool(draw(st.integers(0, 4)))
    if path.suffix == ".safetensors":
        return name, draw(st.one_of(damages(2), damaged_files(content))), fits
    if path.suffix == ".json" and draw(st.integers(0, 3)):
        record = draw(other(json.loads(content)))
        if fits and path.name == MANIFEST:
            record = with_check({key: value for key, value in record.items() if key != "check"})
        return name, json.dumps(record).encode("utf-8", "replace"), fits
    if path.suffix == ".jsonl" and draw(st.booleans()):
        lines = [json.loads(line) for line in content.splitlines()]
        text = "\n".join(map(json.dumps, draw(other(lines))))
        return name, text.encode("utf-8", "replace"), fits
    cut = st.integers(0, len(content)).map(lambda n: content[:n])
    return name, draw(st.one_of(cut, st.binary(max_size=40), st.just(b"[" * 5000))), fits


@st.composite
def other(draw: st.DrawFn, data: Any) -> Any:
    """Draw a record, or several, with one or two other values."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(positions(data))))
        if draw(st.booleans()):
            container[key] = copy.deepcopy(draw(st.one_of(json_values(), st.integers(-2, 9))))
        else:
            del container[key]
    return data


@property_test(
    "a damaged checkpoint, train --resume",
    few=4,
    many=150,
    shrink=False,
    case=st.deferred(damaged_checkpoints),
)
def test_resume_from_hostile_checkpoints(case: tuple[str, bytes | Damages, bool]) -> None:
    """Accepted runs finish. Refusals say where, and leave the folder unchanged."""
    name, content, fits = case
    with scratch_folder() as folder:
        run = Path(shutil.copytree(stopped_run().run, folder / "run"))
        if isinstance(content, bytes):
            (run / name).write_bytes(content)
        else:
            save_file(damage_tensors(load_file(run / name), content), run / name)
        if fits and not name.endswith(MANIFEST):
            reseal(run)
        outside = {p: folder_content(p) for p in (stopped_run().base, stopped_run().data)}
        try:
            resume_copy(run)
        finally:
            assert all(folder_content(path) == before for path, before in outside.items())
        assert (run / "adapter" / "adapter.safetensors").is_file()


SNARES = (
    *("adapter", "steps.jsonl", "steps.jsonl.partial", "basis.safetensors", "run.json", ".lock"),
    *("checkpoint-3", "checkpoint-6", "checkpoint-3.partial", "checkpoint-6.partial"),
    *("checkpoint-3.before", "checkpoint-6.before", "checkpoint-3.removed", "checkpoint-9"),
    *("adapter/adapter.safetensors", "adapter/adapter.safetensors.partial", "checkpoint-12"),
    *("adapter/adapter.safetensors.partial.mode", "checkpoint-6/x", "checkpoint-3/x"),
)


@property_test(
    "links in a stopped run's folder, train --resume",
    few=4,
    many=150,
    found=folder_entries(*SNARES),
)
def test_resume_in_a_folder_with_links(found: dict[str, str]) -> None:
    """Targets of links are neither written nor removed."""
    with scratch_folder() as folder:
        run = Path(shutil.copytree(stopped_run().run, folder / "run"))
        for name in found:
            if name.startswith("adapter/"):
                (run / "adapter").mkdir(exist_ok=True)
            elif (run / name).is_dir():
                shutil.rmtree(run / name)
            else:
                (run / name).unlink(missing_ok=True)
        fill_folder(run, found)
        shutil.copytree(stopped_run().run / "checkpoint-3", folder / "outside", dirs_exist_ok=True)
        before = folder_content(folder / "outside")
        try:
            resume_copy(run)
        finally:
            assert folder_content(folder / "outside") == before
