"""Small runs of every method that are killed, resumed and compared with uninterrupted ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from support.adapter_paths import adapter_path
from support.kill_process import ForkServer, ProcessResult
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

# The rows of the matrix in docs/how-to/resume.md: kill point -> at which occurrence the run dies.
TRAINING_POINTS = {
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
EXPORT_POINTS = {"export-begun": 1, "export-torn": 1, "export-written": 1, "export-renamed": 1}
CALIBRATION_POINTS = {"calibrating", "basis-torn", "calibrated"}


@dataclass(frozen=True)
class Recovery:
    """The outcome of a run that was killed and resumed.

    Attributes:
        code: exit code of the first process; -9 for a kill, 130 for Ctrl-C.
        after: step of the checkpoint that the second process resumed from; 0 if it started from
            the beginning, None if the run had finished and nothing changed.
        weights: the final weights equal those of the uninterrupted run, bit for bit.
        records: so do evaluations, logged losses, data order, touched parameters and the basis.
        said: stderr of the second process.
    """

    code: int
    after: int | None
    weights: bool
    records: bool
    said: str


class Workspace:
    """A folder with a model, data, uninterrupted runs of each method, and killed ones."""

    def __init__(self, place: Path, fork_server: ForkServer) -> None:
        self.place, self.fork_server = place, fork_server
        self.base, self.data = base_folder(place / "base"), data_folder(place / "data")
        self._number = 0

    def settings(self, method: str, *more: str) -> tuple[str, ...]:
        """Return arguments of ``sparsegrad train``, without the output folder."""
        return (f"model={self.base}", f"task.path={self.data}", *COMMON, *METHODS[method], *more)

    def train(self, method: str, run: Path, *flags: str, **kill: Any) -> ProcessResult:
        """Start or resume a run."""
        return self.fork_server.run("train", *self.settings(method), "-o", str(run), *flags, **kill)

    def uninterrupted_run(self, method: str) -> Path:
        """Return the run that the others are compared with, trained on first use."""
        run = self.place / f"{method.replace(' ', '-')}-uninterrupted"
        if not run.is_dir():
            ended = self.train(method, run)
            assert ended.code == 0, ended.err
        return run

    def new_run(self) -> Path:
        """Return an unused path for a run."""
        self._number += 1
        return self.place / f"run-{self._number}"

    def kill_and_resume(self, method: str, *points: str) -> Recovery:
        """Kill a run at the first point and its resumptions at the others; then let it finish."""
        whole, run = self.uninterrupted_run(method), self.new_run()
        codes = []
        for number, point in enumerate(points):
            flags = ("--resume",) if number else ()
            ended = self.train(method, run, *flags, point=point, count=TRAINING_POINTS[point])
            expected = 130 if point.startswith("interrupted") else -9
            assert ended.code == expected, f"{point} did not come to {method}: {ended.err}"
            codes.append(ended.code)
        left = (run / "run.json").read_bytes() if (run / "run.json").is_file() else b""
        ended = self.train(method, run, "--resume")
        assert ended.code == 0, f"{method}, {points}: {ended.err}"
        untouched = (run / "run.json").read_bytes() == left
        mine, theirs = record(run), record(whole)
        found = Recovery(
            codes[0],
            None if untouched else mine["resumed_from"],
            weights(run) == weights(whole),
            results(mine) == results(theirs),
            ended.err,
        )
        shutil.rmtree(run)
        return found

    def kill_and_repeat_export(self, method: str, point: str) -> Recovery:
        """Kill an export, and repeat the command."""
        run = self.new_run()
        shutil.copytree(self.uninterrupted_run(method), run)
        command = ("export", str(run), "--to", "merged")
        whole = self.fork_server.run(*command, "-o", str(self.place / f"{run.name}-merged"))
        assert whole.code == 0, whole.err
        killed = self.fork_server.run(*command, point=point)
        assert killed.code == -9, f"{point} did not come to {method}: {killed.err}"
        again = () if point != "export-renamed" else ("--overwrite",)
        ended = self.fork_server.run(*command, *again)
        assert ended.code == 0, ended.err
        left = [path.name for path in run.glob("export-*")]
        hashes = [
            tensors_hash(folder / "model.safetensors")
            for folder in (run / "export-merged", self.place / f"{run.name}-merged")
        ]
        shutil.rmtree(run)
        return Recovery(
            killed.code, 0, hashes[0] == hashes[1], left == ["export-merged"], ended.err
        )


def record(run: Path) -> dict[str, Any]:
    """Return run.json."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def results(run: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a record that a resumed run must reproduce: no times, memory or paths."""
    blocks = ("metrics", "hashes", "counts", "sparsity", "precision", "task", "method")
    basis = run.get("calibration") or {}
    return {key: run[key] for key in blocks} | {key: basis.get(key) for key in ("digest", "tokens")}


def weights(run: Path) -> str:
    """Return the sha256 (hex) of the trained tensors."""
    return tensors_hash(adapter_path(run))


def tensors_hash(path: Path) -> str:
    """Return the sha256 (hex) of all tensors by name, whatever the order of keys in the header."""
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def flat(ended: ProcessResult) -> str:
    """Return stderr of a command as one line without frames."""
    return " ".join(ended.err.replace("│", " ").split())


def largest_file(folder: Path) -> int:
    """Return the size of the largest file, in bytes."""
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
