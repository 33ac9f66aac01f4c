"""Energy of held-out gradients and CPU seconds by the way the basis is calibrated.

python -m benchmarks.calibration_cost --tasks cola --data FOLDER --out docs/results/energy_cola.json

Each way computes the bases and the static support of one model; then the gradients of batches that
no way has read are projected on all of them. The head of those gradients was warmed up on other
batches again. FOLDER holds GLUE's files; without it the built-in task is used.

With ``--before CHECKOUT``, scores of training are compared instead: the calibration of that
version, with 32 batches, against the defaults of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save
from benchmarks.whole_job import FILES, write_rows
from sparsegrad_cli.calibration.calibrate import calibrate
from sparsegrad_cli.calibration.gradients import gradient_step, gradients_only
from sparsegrad_cli.calibration.select_rows import CANDIDATES, body_features, representative
from sparsegrad_cli.calibration.warmup import WARMUP_BATCHES, warmed_head
from sparsegrad_cli.models.targets import Target, head_parameters
from sparsegrad_cli.numerics.hosvd import map_bases, truncated
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.records.environment import git_state
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.setup import Setup, load, random_batches, random_rows, training_batches

# name -> batches of the warm-up, whether it has batches of its own, calibration settings, rank
Way = tuple[int, bool, dict[str, Any], int | None]
MANY = "50 + 32 batches, source token"


def ways(ranks: list[int]) -> dict[str, Way]:
    """Return the ways to calibrate that are compared."""
    usual: dict[str, Any] = {"source": "token"}
    found: dict[str, Way] = {MANY: (50, True, {"source": "token", "steps": 32}, None)}

    def add(name: str, warm: int, own: bool, steps: int, **more: Any) -> None:
        found[name] = (warm, own, usual | {"steps": steps} | more, None)

    for count in (1, 2, 4, 8, 12, 16):
        add(f"{count} batches", min(count, WARMUP_BATCHES), False, count)
    for count in (1, 2, 4):
        add(f"{count} batches, maxvol", count, False, count, select="maxvol")
    add("12 batches, head warmed up on 12", 12, False, 12)
    add("12 batches, head warmed up on 50", 50, True, 12)
    add("12 batches, power step", WARMUP_BATCHES, False, 12, power_steps=1)
    add("12 batches, Gram matrices", WARMUP_BATCHES, False, 12, decomposition="exact")
    add("12 batches, scored", WARMUP_BATCHES, False, 12, score="token_square")
    for source in ("token_gradient", "batch"):
        settings = {"source": source, "steps": 12}
        found[f"12 batches, source {source}"] = (WARMUP_BATCHES, False, settings, None)
    add("50 + 32 batches, source token_gradient", 50, True, 32, source="token_gradient")
    for count in (1, 2, 4):
        gradient = {"source": "token_gradient"}
        add(f"{count} batches, source token_gradient", count, False, count, **gradient)
        gradient["select"] = "maxvol"
        add(f"{count} batches, source token_gradient, maxvol", count, False, count, **gradient)
    for rank in ranks:
        way = (WARMUP_BATCHES, False, usual | {"steps": 12}, rank)
        found[f"12 batches, rank {rank}"] = way
    return found


def settings_of(task: str, data: Path, model: str, seed: int, rank: int | None) -> list[str]:
    """Return the settings of a recipe."""
    pair = ["task.columns.text_pair=text_pair"] if task == "rte" else []
    size = f", rank: {rank}" if rank else ""
    settings = [
        f"model={model}",
        "task=csv",
        f"task.path={data}",
        "task.max_length=128",
        "task.columns.text=text",
        "task.columns.label=label",
        *pair,
        f"method={{name: sparsegrad, support: static, density: 0.01{size}}}",
        "train.per_device_train_batch_size=32",
        "train.use_cpu=true",
        f"seed={seed}",
    ]
    return settings


def setup_of(task: str, data: Path, model: str, seed: int, rank: int | None, folder: Path) -> Any:
    """Load model and data for a rank of the core."""
    settings = settings_of(task, data, model, seed, rank)
    run = Run(load_recipe(None, tuple(settings)), RunWriter(folder), Observer())
    return run, load(run)


def plan(run: Run, setup: Setup, way: Way, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Calibrate; return target -> (basis, positions), and the cost."""
    warm, own, changes, _ = way
    settings = run.recipe.calibration.model_copy(update=changes)

    started, cpu = time.perf_counter(), time.process_time()
    chosen = None
    if settings.select == "maxvol":
        wanted = 32 * settings.steps
        rows = random_rows(setup, seed)[: CANDIDATES * wanted]
        features = body_features(setup.model, training_batches(setup, rows, 32))
        chosen = [rows[number] for number in representative(features, wanted)]

    def batches(count: int, offset: int = 0) -> list[dict[str, Tensor]]:
        if chosen is not None:
            return list(islice(training_batches(setup, chosen, 32), count))
        return list(islice(random_batches(setup, 32, seed + offset), count))

    with warmed_head(
        setup.model,
        lambda: batches(warm, 2 if own else 0),
        steps=50,
        learning_rate=settings.warmup_learning_rate,
        seed=seed,
    ):
        warmed = time.process_time() - cpu
        made = calibrate(
            setup.model,
            setup.targets,
            lambda: iter(batches(settings.steps)),
            settings,
            seed=seed,
            rank=setup.method_settings.basis_rank,
        )
    seconds = {
        "cpu_s": time.process_time() - cpu,
        "warmup_cpu_s": warmed,
        "wall_s": time.perf_counter() - started,
    }
    bases = map_bases(
        made.by_target(), lambda name, b: truncated(b, setup.method_settings.basis_rank)
    )
    plans = setup.method_settings.implementation().planned(setup.targets, bases, made.scores)
    return {n: (bases[n], p.positions) for n, p in plans.items()}, seconds


class Energies:
    """Shares of the energy of gradients in the supports of several ways.

    Args:
        setup: the model that all ways have calibrated.
        plans: way -> target -> (basis, positions).
        batches: held-out batches.
    """

    def __init__(
        self, setup: Setup, plans: dict[str, dict[str, Any]], batches: Iterator[dict[str, Tensor]]
    ) -> None:
        self.setup, self.plans, self.batches = setup, plans, batches
        self._shares: dict[str, dict[str, list[float]]] = {way: {} for way in plans}

    def measure(self, steps: int, seed: int) -> None:
        """Project the gradients of more batches on every support."""
        setup = self.setup
        with temporary_seed(seed), gradients_only(setup.model, setup.targets, self._collect):
            for step in range(1, steps + 1):
                gradient_step(setup.model, next(self.batches), step)

    def _collect(self, target: Target, grad_OI: Tensor) -> None:
        total = float(grad_OI.double().square().sum())
        for way, supports in self.plans.items():
            basis, positions = supports[target.name]
            core = to_core(grad_OI, basis).reshape(-1)
            kept = core if positions is None else core[positions.to(torch.int64)]
            share = float(kept.double().square().sum()) / total
            self._shares[way].setdefault(target.kind, []).append(share)

    def means(self) -> dict[str, dict[str, float]]:
        """Return way -> kind of layer -> mean share."""
        return {
            way: {kind: statistics.mean(each) for kind, each in kinds.items()}
            for way, kinds in self._shares.items()
        }


def warm_energies(
    setup: Setup, plans: dict[str, dict[str, Any]], seed: int, steps: int
) -> dict[str, dict[str, float]]:
    """Return the shares before training, with a head that no way has warmed up."""
    energies = Energies(setup, plans, random_batches(setup, 32, seed + 1))
    others = random_batches(setup, 32, seed + 7)
    with warmed_head(
        setup.model, lambda: list(islice(others, 50)), steps=50, learning_rate=1e-3, seed=seed
    ):
        energies.measure(steps, seed)
    return energies.means()


def trained_energies(
    setup: Setup, plans: dict[str, dict[str, Any]], seed: int, steps: int
) -> dict[str, dict[str, float]]:
    """Return the shares after 40, 80 and 120 steps of full fine-tuning, which changes the model."""
    energies = Energies(setup, plans, random_batches(setup, 32, seed + 3))
    head = head_parameters(setup.model)
    body = [p for name, p in setup.model.named_parameters() if name not in head]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": 5e-5}, {"params": list(head.values()), "lr": 1e-3}]
    )
    training = random_batches(setup, 32, seed + 11)
    torch.manual_seed(seed)
    setup.model.train()
    for step in range(1, 121):
        setup.model(**next(training)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            energies.measure(steps // 2, seed)
    return energies.means()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["acceptability"])
    parser.add_argument("--data", type=Path, help="folder of GLUE's files")
    parser.add_argument("--model", default="builtin:minilm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 3705, 2023])
    parser.add_argument("--ranks", type=int, nargs="*", default=[192, 384])
    parser.add_argument("--ways", nargs="*", help="names of ways; all by default")
    parser.add_argument("--trained", action="store_true", help="measure in fine-tuning, too")
    parser.add_argument("--steps", type=int, default=8, help="held-out batches")
    parser.add_argument("--before", type=Path, help="another checkout: compare scores with it")
    parser.add_argument("--train-steps", type=int, default=250, help="of these scores")
    parser.add_argument("--rows", type=int, default=8000, help="of the training set, for scores")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    make = measured if args.before is None else scores
    rows = [row for task in args.tasks for seed in args.seeds for row in make(task, seed, args)]
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    save(args.out, "calibration_cost", {"settings": settings, "rows": rows})


def measured(task: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per way, for a task and a seed."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_rows(data, task, args.data if task in FILES else None, None)
        plans, costs, setup = {}, {}, None
        loaded: dict[int | None, Any] = {}
        for name, way in ways(args.ranks).items():
            if args.ways and name not in args.ways:
                continue
            if way[3] not in loaded:
                loaded[way[3]] = setup_of(task, data, args.model, seed, way[3], Path(folder))
            run, setup = loaded[way[3]]
            plans[name], costs[name] = plan(run, setup, way, seed)
        assert setup is not None
        warm = warm_energies(setup, plans, seed, args.steps)
        trained = trained_energies(setup, plans, seed, args.steps) if args.trained else {}
    rows: list[dict[str, Any]] = [
        {
            "task": task,
            "seed": seed,
            "way": name,
            "energy": warm[name],
            "energy_in_training": trained.get(name, {}),
            **costs[name],
        }
        for name in plans
    ]
    for row in rows:
        parts = [*row["energy"].values(), *row["energy_in_training"].values()]
        shares = " ".join(f"{share:.3f}" for share in parts)
        print(f"{task} {seed} {row['way']:40} {shares}  {row['cpu_s']:.1f} s", flush=True)
    return rows


def scores(task: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with this checkout's calibration and with that of another; return their scores."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_rows(data, task, args.data if task in FILES else None, args.rows)
        for name, checkout in (("before", args.before), ("now", Path(__file__).parents[1])):
            run = Path(folder) / name
            command = [
                *(sys.executable, "-m", "sparsegrad_cli", "train", "quickstart"),
                *settings_of(task, data, args.model, seed, None),
                f"train.max_steps={args.train_steps}",
                *(("calibration.steps=32",) if name == "before" else ()),
                *("-o", str(run)),
            ]
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True)
            record = json.loads((run / "run.json").read_text(encoding="utf-8"))
            rows.append(
                {
                    "task": task,
                    "seed": seed,
                    "version": name,
                    "commit": git_state(checkout).commit,
                    "final": record["metrics"]["final"],
                    "time": record["time"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
