"""What killed runs are compared in: small runs of every method, and one cell of moment x method."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from support.adapter_paths import trained_in
from support.kill_process import Ended, Killer
from support.small_runs import base_folder, data_folder

# 48 rows in batches of 5, three a step: ten batches an epoch, the fourth step of it has one. Stops
# early at step 8 of 24, its best evaluation at step 4.
COMMON = (
    "task=csv",
    "task.max_length=16",
    "train.per_device_train_batch_size=5",
    "train.gradient_accumulation_steps=3",
    "train.learning_rate=3e-2",
    "train.lr_scheduler_type=linear",
    "train.max_grad_norm=1",
    "train.weight_decay=0.01",
    "train.max_steps=24",
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.logging_steps=3",
    "train.early_stopping_patience=2",
    "calibration.steps=3",
    "calibration.warmup_steps=2",
    "train.use_cpu=true",
)
BATCHES_A_STEP = 3
METHODS = {
    "full": ("method=full",),
    "lora": ("method=lora", "method.rank=2", "method.dropout=0.1"),
    "meprop": ("method=meprop", "method.density=0.05"),
    "core static": ("method.form=core", "method.support=static", "method.density=0.05"),
    "core dynamic": (
        "method.form=core",
        "method.support=dynamic",
        "method.density=0.05",
        "method.rank=8",
        "method.state_capacity=2.0",
    ),
    "core refresh": (
        "method.form=core",
        "method.support=refresh",
        "method.refresh_steps=3",
        "method.density=0.05",
        "method.rank=8",
        "calibration.keep_head=true",
    ),
    "materialized": (
        "method.form=materialized",
        "method.density=0.05",
        "calibration.basis_per=kind",
    ),
    "rotated": ("method.form=rotated", "method.density=0.05"),
}
NEEDS_BASIS = {name for name, settings in METHODS.items() if "method.form" in settings[0]}

# The moments of docs/survival.md: name -> which time it comes round.
TRAINING = {
    "begun": 1,
    "loaded": 1,
    "record-torn": 3,  # once the method has prepared the model
    "calibrating": 2,
    "basis-torn": 1,
    "calibrated": 1,
    "step": 8,
    "interrupted": 4 * BATCHES_A_STEP - 2,  # the last batch of step 4, which is an epoch's end
    "interrupted-twice": 8,
    "line-torn": 4,
    "evaluated": 3,
    "checkpoint-begun": 2,
    "checkpoint-torn": 2,
    "checkpoint-written": 2,
    "checkpoint-renamed": 2,
    "dropping": 1,
    "trained": 1,
    "adapter-torn": 1,
    "adapter-renamed": 1,
    "reporting": 1,
}
EXPORTING = {"export-begun": 1, "export-torn": 1, "export-written": 1, "export-renamed": 1}
CALIBRATING = {"calibrating", "basis-torn", "calibrated"}


@dataclass(frozen=True)
class Cell:
    """What became of a run that was killed.

    Attributes:
        code: how the first process ended; -9 for a kill, 130 for Ctrl-C.
        after: the step of the checkpoint that the second one went on from; 0 for the beginning,
            None if it was done already, and the second one changed nothing.
        weights: the final weights are those of the undisturbed run, bit for bit.
        records: evaluations, logged losses, data order, entries touched and the basis, too.
        said: what the second process wrote to stderr.
    """

    code: int
    after: int | None
    weights: bool
    records: bool
    said: str


class Bench:
    """A folder with a model, data and one undisturbed run of each method asked for."""

    def __init__(self, place: Path, killer: Killer) -> None:
        self.place, self.killer = place, killer
        self.base, self.data = base_folder(place / "base"), data_folder(place / "data")
        self._number = 0

    def settings(self, method: str, *more: str) -> tuple[str, ...]:
        """Arguments of ``sparsegrad train``, but for where to write."""
        return (f"model={self.base}", f"task.path={self.data}", *COMMON, *METHODS[method], *more)

    def train(self, method: str, run: Path, *flags: str, **kill: Any) -> Ended:
        """One run or its resumption."""
        return self.killer.run("train", *self.settings(method), "-o", str(run), *flags, **kill)

    def undisturbed(self, method: str) -> Path:
        """The run that the others are compared with, made once."""
        run = self.place / f"{method.replace(' ', '-')}-undisturbed"
        if not run.is_dir():
            ended = self.train(method, run)
            assert ended.code == 0, ended.err
        return run

    def fresh(self) -> Path:
        """A name for one more run."""
        self._number += 1
        return self.place / f"run-{self._number}"

    def cell(self, method: str, *moments: str) -> Cell:
        """Kill a run at the first moment, its resumption at the next and so on; then let it end."""
        whole, run = self.undisturbed(method), self.fresh()
        codes = []
        for number, moment in enumerate(moments):
            flags = ("--resume",) if number else ()
            ended = self.train(method, run, *flags, moment=moment, count=TRAINING[moment])
            expected = 130 if moment.startswith("interrupted") else -9
            assert ended.code == expected, f"{moment} did not come to {method}: {ended.err}"
            codes.append(ended.code)
        left = (run / "run.json").read_bytes() if (run / "run.json").is_file() else b""
        ended = self.train(method, run, "--resume")
        assert ended.code == 0, f"{method}, {moments}: {ended.err}"
        untouched = (run / "run.json").read_bytes() == left
        mine, theirs = record(run), record(whole)
        found = Cell(
            codes[0],
            None if untouched else mine["resumed_from"],
            weights(run) == weights(whole),
            results(mine) == results(theirs),
            ended.err,
        )
        shutil.rmtree(run)
        return found

    def export_cell(self, method: str, moment: str) -> Cell:
        """Kill an export, and say the same command again."""
        run = self.fresh()
        shutil.copytree(self.undisturbed(method), run)
        command = ("export", str(run), "--to", "merged")
        whole = self.killer.run(*command, "-o", str(self.place / f"{run.name}-merged"))
        assert whole.code == 0, whole.err
        killed = self.killer.run(*command, moment=moment)
        assert killed.code == -9, f"{moment} did not come to {method}: {killed.err}"
        again = () if moment != "export-renamed" else ("--overwrite",)
        ended = self.killer.run(*command, *again)
        assert ended.code == 0, ended.err
        left = [path.name for path in run.glob("export-*")]
        hashes = [
            tensors_hash(folder / "model.safetensors")
            for folder in (run / "export-merged", self.place / f"{run.name}-merged")
        ]
        shutil.rmtree(run)
        return Cell(killed.code, 0, hashes[0] == hashes[1], left == ["export-merged"], ended.err)


def record(run: Path) -> dict[str, Any]:
    """run.json."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def results(run: dict[str, Any]) -> dict[str, Any]:
    """What a run's record says of what was learnt, and from what: all but times, memory, places."""
    blocks = ("metrics", "hashes", "counts", "sparsity", "precision", "task", "method")
    basis = run.get("calibration") or {}
    return {key: run[key] for key in blocks} | {key: basis.get(key) for key in ("digest", "tokens")}


def weights(run: Path) -> str:
    """sha256 (hex) of what was trained."""
    return tensors_hash(trained_in(run))


def tensors_hash(path: Path) -> str:
    """sha256 (hex) of all tensors by name; the file's own head has its keys in any order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def flat(ended: Ended) -> str:
    """What a command wrote to stderr, as one line without frames."""
    return " ".join(ended.err.replace("│", " ").split())


def largest_file(folder: Path) -> int:
    """Bytes."""
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
