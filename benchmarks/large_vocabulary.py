"""Losses over a sample of a large vocabulary (train.loss: sce, rece) against the full loss.

python -m benchmarks.large_vocabulary losses --trees FILE --out docs/results/large_vocabulary.json
python -m benchmarks.large_vocabulary step --trees FILE
python -m benchmarks.large_vocabulary training --trees FILE

``losses`` measures, at the head alone, the agreement of the gradients with those of the chunked
full loss, CPU seconds and counted peak bytes: with SmolLM2's head (49,152 classes) and its hidden
states of real conversations, and with a catalogue of a million classes and random states of 64
numbers (a state is half of its target's weights, the other half noise). ``step`` measures the
forward and backward pass of the whole SmolLM2 with each loss. ``training`` trains the last ten
blocks of SmolLM2 with LoRA for equal steps by each loss, and compares the full validation loss.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import interleave, ratios, save
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.lm_head import states_of
from sparsegrad_cli.numerics.linear_cross_entropy import linear_cross_entropy
from sparsegrad_cli.numerics.sampled_cross_entropy import (
    rece_sets,
    sampled_cross_entropy,
    sce_sets,
)
from sparsegrad_cli.numerics.seeding import generator_of
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.tasks.task import LoadedTask, RowLimits, load_chat_task
from sparsegrad_cli.training.train import train

FULL = "full"
# Rows of the table -> keys of train.
SAMPLES: dict[str, dict[str, Any]] = {
    "sce": {"loss": "sce"},
    "sce, 1,024 classes": {"loss": "sce", "loss_bucket_classes": 1024},
    "sce, 4,096 classes": {"loss": "sce", "loss_bucket_classes": 4096},
    "sce, no mix": {"loss": "sce", "loss_mix": False},
    "rece": {"loss": "rece"},
    "rece, 4 neighbours": {"loss": "rece", "loss_neighbours": 4},
    "rece, 4 rounds": {"loss": "rece", "loss_rounds": 4},
}
TRAINED = (FULL, "sce", "rece")
CATALOGUE, WIDTH = 1_000_000, 64  # The papers' models have 64 hidden units.


def keys_of(name: str) -> tuple[str, ...]:
    """Return the recipe overrides of a row."""
    return tuple(f"train.{key}={json.dumps(value)}" for key, value in SAMPLES.get(name, {}).items())


# --- the head alone


def loss_of(name: str, hidden: Tensor, weight: Tensor, target: Tensor, draw: int) -> Tensor:
    """Return the loss of a row of the table, summed over positions."""
    if name == FULL:
        return linear_cross_entropy(hidden, weight, target)
    said = {key.removeprefix("loss_"): value for key, value in SAMPLES[name].items()}
    generator = generator_of(42, draw)
    states, head = hidden.detach(), weight.detach()
    if said.pop("loss") == "sce":
        classes = said.pop("bucket_classes", 256)
        sets = sce_sets(states, head, generator, classes=classes, **said)
    else:
        sets = rece_sets(states, head, generator, **said)
    return sampled_cross_entropy(hidden, weight, target, sets)


def agreement(
    name: str, hidden: Tensor, weight: Tensor, target: Tensor, exact: Mapping[str, Any], draws: int
) -> dict[str, float]:
    """Return medians over draws of cosine and relative error against the full gradients."""
    found: dict[str, list[float]] = {}
    for draw in range(draws):
        loss, *gradients = with_gradients(name, hidden, weight, target, draw)
        found.setdefault("loss", []).append(float(loss) / len(target))
        for of, gradient in zip(("hidden", "head"), gradients, strict=True):
            whole = exact[of]
            error = (gradient - whole).norm() / whole.norm()
            cosine = torch.nn.functional.cosine_similarity(
                gradient.flatten(), whole.flatten(), dim=0
            )
            found.setdefault(f"{of}_error", []).append(float(error))
            found.setdefault(f"{of}_cosine", []).append(float(cosine))
    return {key: statistics.median(values) for key, values in found.items()}


def with_gradients(
    name: str, hidden: Tensor, weight: Tensor, target: Tensor, draw: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a loss, and its gradients for hidden states and head."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_of(name, hidden, weight, target, draw)
    dhidden, dweight = torch.autograd.grad(loss, [hidden, weight])
    return loss.detach(), dhidden, dweight


def peak_bytes(call: Callable[[], object], *inputs: Tensor) -> int:
    """Return the counted peak of a call beyond its inputs."""
    meter = MemoryMeter()
    meter.watch(nn.Module(), bases=inputs)
    before = sum(meter.live().values())
    with meter.phase("backward"):
        call()
    peak = meter.peak("backward")
    assert peak is not None
    return peak.peak_bytes - before


def head_table(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    options: argparse.Namespace,
    *,
    trains: bool,
) -> dict[str, dict[str, float]]:
    """Return a row for each loss.

    Args:
        hidden, weight, target: of the head.
        options: names of the rows, rounds of the timing, draws of the agreement.
        trains: whether the head's gradient is part of the seconds and bytes.
    """
    names = [name for name in options.names if name != FULL]

    def side(name: str) -> None:
        states, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trains)
        loss_of(name, states, head, target, 0).backward()

    sides = {name: functools.partial(side, name) for name in (FULL, *names)}
    loss, dhidden, dweight = with_gradients(FULL, hidden, weight, target, 0)
    exact = {"hidden": dhidden, "head": dweight}
    rows: dict[str, dict[str, float]] = {FULL: {"loss": float(loss) / len(target)}}
    rows |= {name: agreement(name, hidden, weight, target, exact, options.draws) for name in names}
    del exact, dhidden, dweight
    for name, call in sides.items():
        rows[name]["peak_bytes"] = peak_bytes(call, hidden, weight, target)
    for name, timed in ratios(interleave(sides, options.rounds, time.process_time), FULL).items():
        rows[name] |= timed
        print(name, {key: round(value, 4) for key, value in rows[name].items()}, flush=True)
    return rows


def labelled(task: LoadedTask, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and targets of labelled tokens, and the head's weight."""
    states, targets = [], []
    with torch.no_grad():
        for row in task.train_data:
            batch = dict(task.collator([row]))
            labels = batch.pop("labels")[:, 1:]
            chosen = labels != -100
            states.append(states_of(task.model, batch)[:, :-1][chosen])
            targets.append(labels[chosen])
            if sum(map(len, targets)) >= positions:
                break
    head = task.model.get_output_embeddings().weight  # type: ignore[operator]
    return torch.cat(states)[:positions], torch.cat(targets)[:positions], head.detach()


def catalogue(positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random states that lean towards their targets, the targets, and a random head."""
    draw = generator_of(42)
    weight = torch.randn((CATALOGUE, WIDTH), generator=draw)
    target = torch.randint(CATALOGUE, (positions,), generator=draw)
    noise = torch.randn((positions, WIDTH), generator=draw)
    return 0.375 * (weight[target] + noise), target, weight


def step_table(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the seconds of forward and backward of the whole frozen SmolLM2 with each loss.

    The backward pass computes input gradients down to the embeddings, as for an adapter in the
    first block.
    """

    def side(name: str) -> Callable[[], None]:
        loaded = conversations(options.trees, *keys_of(name))
        task = load_chat_task(loaded, RowLimits(4 * options.rows, 1))
        batch = dict(task.collator([task.train_data[i] for i in range(options.rows)]))
        model = task.model.requires_grad_(False).train()
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda *of: of[2].requires_grad_())
        return lambda: model(**batch, loss_draw=(1, 1)).loss.backward()

    return ratios(
        interleave({name: side(name) for name in options.names}, options.rounds, time.process_time),
        FULL,
    )


def conversations(trees: Path, *more: str) -> Any:
    """Return the recipe of SmolLM2 on OASST."""
    section = {"name": "oasst", "path": str(trees), "max_length": 256}
    section["chat"] = {"paths": "best", "packing": "pack"}
    overrides = (f"task={json.dumps(section)}", "method={name: lora, rank: 8}", *more)
    return load_recipe("configs/smollm2_dialogues.yaml", overrides)


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the head alone at both sizes, and the whole SmolLM2."""
    found: dict[str, Any] = {}
    limits = RowLimits(options.positions // 64, 1)
    hidden, target, weight = labelled(
        load_chat_task(conversations(options.trees), limits), options.positions
    )
    found["smollm2"] = {
        "classes": len(weight),
        "hidden": weight.shape[1],
        "positions": len(target),
        "rows": head_table(hidden, weight, target, options, trains=False),
    }
    hidden, target, weight = catalogue(options.catalogue_positions)
    found["catalogue"] = {
        "classes": len(weight),
        "hidden": weight.shape[1],
        "positions": len(target),
        "rows": head_table(hidden, weight, target, options, trains=True),
    }
    return found


# --- training


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Train for equal steps by each loss; return the full validation losses."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.names}
    for seed in options.seeds:
        for name in options.names:
            started = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                loaded = conversations(
                    options.trees,
                    f"task.eval_limit={options.eval_limit}",
                    "targets.blocks='20:'",  # The backward pass ends there.
                    f"train.per_device_train_batch_size={options.batch}",
                    f"train.max_steps={options.steps}",
                    "train.learning_rate=2e-3",
                    "train.eval_strategy=no",
                    "train.logging_steps=10",
                    "train.use_cpu=true",
                    f"seed={seed}",
                    *keys_of(name),
                    f"output_dir={folder}/run",
                )
                record = train(loaded)
            metrics = record.metrics
            assert metrics is not None and metrics.initial is not None and metrics.final is not None
            rows[name].append(
                {
                    "seed": seed,
                    "initial": metrics.initial.loss,
                    "final": metrics.final.loss,
                    "training_losses": [step.loss for step in metrics.train],
                    "cpu_s": time.process_time() - started,
                }
            )
            print(name, rows[name][-1], flush=True)
            result = {"rows": rows, "differences": differences(rows)}
            save(options.out, "large_vocabulary_training", {"settings": told(options), **result})
    return result


def differences(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return each seed's validation loss minus that of training by the full loss."""
    full = {run["seed"]: run["final"] for run in rows.get(FULL, [])}
    return {
        name: [run["final"] - full[run["seed"]] for run in runs if run["seed"] in full]
        for name, runs in rows.items()
        if name != FULL
    }


def told(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the result depends on."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()} | {
        "trees": options.trees.name,
        "out": None,
    }


def main() -> None:
    """Parse the arguments, measure one part and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("losses", "step", "training"))
    parser.add_argument("--trees", type=Path, required=True, help="export of OASST's trees")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--positions", type=int, default=2048, help="of SmolLM2's head")
    parser.add_argument("--catalogue-positions", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens, in the whole step")
    parser.add_argument("--names", nargs="+", choices=(FULL, *SAMPLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 3705, 7])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--eval-limit", type=int, default=24, help="validation conversations")
    parser.add_argument("--batch", type=int, default=2, help="rows of 256 tokens in a step")
    options = parser.parse_args()
    options.names = options.names or (FULL, *(SAMPLES if options.part == "losses" else TRAINED[1:]))
    if options.part == "training":
        training(options)
        return
    found = losses(options) if options.part == "losses" else {"rows": step_table(options)}
    save(options.out, f"large_vocabulary_{options.part}", {"settings": told(options), **found})


if __name__ == "__main__":
    main()
