"""A checkpoint that means harm: --resume goes on from another, begins anew, or says what is wrong.

Only what a user sees of it: what a checkpoint holds, and how damage is noticed, is not told here.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evil import places, values
from hostility import holds, scratch, tree
from hypothesis import strategies as st
from little import base_folder, data_folder, train
from safetensors.torch import load_file, save_file
from tiny import one_thread
from torn_tensors import Spoils, spoil, spoils, torn

CORE = ("method.form=core", "method.density=0.05", "method.rank=7", "train.save_total_limit=5")
DATA: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run that was stopped after three of its six steps."""
    place = tmp_path_factory.mktemp("stopped")
    base, data = base_folder(place / "base"), data_folder(place / "data")
    with one_thread():
        run = train(place / "run", base, data, *CORE, stop=True)
        shutil.rmtree(run / "checkpoint-6")
        DATA.update(base=base, data=data, run=run)
        yield
    DATA.clear()


def names() -> list[str]:
    """The files of its checkpoint, and what else of the run resuming reads."""
    inside = sorted(p.name for p in (DATA["run"] / "checkpoint-3").iterdir())
    return [*(f"checkpoint-3/{name}" for name in inside), "basis.safetensors", "steps.jsonl"]


@st.composite
def mutilated(draw: st.DrawFn) -> tuple[str, bytes | Spoils]:
    """(file, its content or what is to be done to its tensors)."""
    name = draw(st.sampled_from(names()))
    path = DATA["run"] / name
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return name, draw(st.one_of(spoils(2), torn(content)))
    if path.suffix == ".json" and draw(st.integers(0, 3)):
        return name, json.dumps(draw(other(json.loads(content)))).encode("utf-8", "replace")
    cut = st.integers(0, len(content)).map(lambda n: content[:n])
    return name, draw(st.one_of(cut, st.binary(max_size=40), st.just(b"[" * 5000)))


@st.composite
def other(draw: st.DrawFn, record: Any) -> Any:
    """A record with one or two other values."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(record))))
        if draw(st.booleans()):
            container[key] = copy.deepcopy(draw(st.one_of(values(), st.integers(-2, 9))))
        else:
            del container[key]
    return record


@holds(
    "a mutilated checkpoint, train --resume",
    few=4,
    many=150,
    shrink=False,
    case=st.deferred(mutilated),
)
def test_resuming(case: tuple[str, bytes | Spoils]) -> None:
    """What is accepted comes to its end; what is refused says where, and leaves what was there."""
    name, content = case
    with scratch() as folder:
        run = Path(shutil.copytree(DATA["run"], folder / "run"))
        if isinstance(content, bytes):
            (run / name).write_bytes(content)
        else:
            save_file(spoil(load_file(run / name), content), run / name)
        outside = {p: tree(p) for p in (DATA["base"], DATA["data"])}
        try:
            train(run, DATA["base"], DATA["data"], *CORE, resume=True)
        finally:
            assert all(tree(path) == before for path, before in outside.items())
        assert (run / "adapter" / "adapter.safetensors").is_file()
