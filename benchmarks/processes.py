"""Two processes (DDP over gloo, on the CPU) beside one that takes the same global batch.

For every method and support it reports how much the losses differ, how much they differ with
another batch size, and the bytes of gradients that each process contributes to the all-reduce of a
step.

python -m benchmarks.processes --out docs/results/processes.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import save

ROWS: dict[str, tuple[str, ...]] = {
    "full": ("method=full", "train.learning_rate=1e-4"),
    "lora": ("method={name: lora, rank: 3, dropout: 0}",),
    "meprop (entries)": ("method=meprop",),
    "meprop (rows)": ("method={name: meprop, select: rows}",),
    "core, static": ("method.support=static",),
    "core, dense": ("method={name: sparsegrad, support: dense, rank: 128}",),
    "core, dynamic": ("method.support=dynamic",),
    "core, refresh": ("method={name: sparsegrad, support: refresh, refresh_steps: 3}",),
    "materialized, dynamic": ("method={name: sparsegrad, form: materialized}",),
    "rotated, dynamic": ("method={name: sparsegrad, form: rotated}",),
}


def still_model(folder: Path) -> Path:
    """Return the path of the built-in MiniLM without dropout.

    Each process would draw its own dropout masks.
    """
    from sparsegrad_cli.models.pretrained import locate

    shutil.copytree(locate("builtin:minilm"), folder)
    config = folder / "config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    said |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(said), encoding="utf-8")
    return folder


def run(arguments: tuple[str, ...], folder: Path, processes: int) -> dict[str, Any]:
    """Run ``sparsegrad train`` as torchrun starts it and return its run.json."""
    command = [sys.executable, "-m", "sparsegrad_cli", "train", *arguments, "-q", "-o", str(folder)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for number in range(processes):
        told = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            told |= {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1"}
            told |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            told["MASTER_PORT"] = str(port)
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=os.environ | told, **quiet))
    said = [process.communicate()[1] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(said))
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def losses(record: dict[str, Any]) -> list[float]:
    """Return the loss of every training step, then that of the validation rows at the end."""
    metrics = record["metrics"]
    return [*(step["loss"] for step in metrics["train"]), metrics["final"]["loss"]]


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest relative difference between the losses of two runs."""
    pairs = zip(losses(one), losses(other), strict=True)
    return max(abs(a - b) / abs(a) for a, b in pairs)


def measure(steps: int, batch: int, place: Path) -> dict[str, Any]:
    """Measure every method and return all rows."""
    common = (
        f"model={still_model(place / 'model')}",
        f"train.max_steps={steps}",
        "train.logging_steps=1",
        "train.eval_strategy=no",
        "train.save_strategy=no",
        "train.use_cpu=true",
        "task.eval_limit=250",
        "calibration.steps=8",
        f"calibration.batch_size={batch}",
    )
    rows = {}
    for number, (label, method) in enumerate(ROWS.items()):

        def sized(size: int, said: tuple[str, ...] = (*common, *method)) -> tuple[str, ...]:
            return (*said, f"train.per_device_train_batch_size={size}")

        alone = run(sized(batch), place / f"{number}-alone", 1)
        both = run(sized(batch // 2), place / f"{number}-both", 2)
        other = run(sized(batch // 2), place / f"{number}-other", 1)
        rows[label] = {
            "apart": apart(alone, both),
            "other_batch_apart": apart(alone, other),
            "gradient_bytes_per_step": both["sizes"]["gradient_bytes_per_step"],
            "trainable": both["counts"]["trainable"],
            "losses": [losses(alone), losses(both)],
        }
        print(label, {key: rows[label][key] for key in list(rows[label])[:4]}, file=sys.stderr)
    return rows


def main() -> None:
    """Parse the arguments, measure and save the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="of all processes together")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = measure(args.steps, args.batch, Path(place))
    save(args.out, "processes", {"steps": args.steps, "batch": args.batch, "rows": rows})


if __name__ == "__main__":
    main()
