"""Memory of one GPU and bytes that it sends, for LLaMA-2 of 7B to 70B on 8 to 512 GPUs, simulated.

Nothing is downloaded and no weights are allocated. Each row is a fake run on fake processes, as
``sparsegrad estimate --processes N --shard fsdp2`` makes it. With ``--page`` the tables
of docs/explanation/scaling.md are written from the saved rows.

python -m benchmarks.scaling --out docs/results/scaling.json
python -m benchmarks.scaling --page docs/explanation/scaling.md --out docs/results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import save
from sparsegrad_cli.estimate.fake_model import name_task
from sparsegrad_cli.estimate.fake_processes import fake_processes
from sparsegrad_cli.estimate.fake_run import STEP, Conditions, FakeRun
from sparsegrad_cli.memory.collectives import RING, Kind, Sent
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.study import make_study
from sparsegrad_cli.report.units import GIB, MIB

MODELS = {
    "7B": "meta-llama/Llama-2-7b-hf",
    "13B": "meta-llama/Llama-2-13b-hf",
    "70B": "meta-llama/Llama-2-70b-hf",
}
PROCESSES = (8, 64, 512)
# How the model is shared -> methods; FSDP2 refuses MeProp.
METHODS = {"fsdp2": ("sparsegrad", "lora", "full"), "ddp": ("sparsegrad", "lora", "meprop", "full")}
# One sequence of 2,048 tokens per GPU; the projections of every MLP train.
SETTINGS = (
    "model.dtype=bfloat16",
    "task=builtin:dialogues",
    "task.max_length=2048",
    "method.density=0.0022",
    "scope=head",
    "train.bf16=true",
    "train.per_device_train_batch_size=1",
    "train.gradient_checkpointing=true",
    "calibration.batch_size=1",
)
DEPTHS = (3, 4)  # blocks; in more of them every figure grows by the same bytes a block
Row = dict[str, Any]


def measure(model: str, shard: Any, processes: int, depths: Sequence[int]) -> list[Row]:
    """Return a row for each method.

    A whole model takes a minute of CPU time for each row, so two shallow ones are simulated, and
    their difference is a block's. With a single depth, that depth is simulated alone.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = configuration_of(ModelSection(name=MODELS[model]))
        found = []
        for blocks in depths:
            config = {**whole.to_dict(), "num_hidden_layers": blocks}
            place = Path(folder) / str(blocks)
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
            found.append(simulate(place, shard, processes))
        for method in METHODS[shard]:
            first, last = found[0][method], found[-1][method]
            rise = {key: last[key] - first[key] for key in first}
            more = (whole.num_hidden_layers - depths[0]) / max(1, depths[-1] - depths[0])
            figures = {key: round(first[key] + more * rise[key]) for key in first}
            row = {"model": model, "shard": shard, "processes": processes, "method": method}
            rows.append(row | {"simulated_blocks": list(depths), "bytes": figures})
            print(model, shard, processes, method, file=sys.stderr)
    return rows


def simulate(model: Path, shard: Any, processes: int) -> dict[str, dict[str, int]]:
    """Return method -> figures of one process of a fake run, in bytes.

    ``<phase>.<category>`` is a category at a phase's peak, ``payload.<kind>`` a kind of collective.
    """
    study = make_study(None, METHODS[shard], 1, (f"model={model}", *SETTINGS), option="--method")
    conditions = Conditions(kernels="cuda", padded=False, processes=processes, shard=shard)
    found = {}
    for cell in study.cells:
        config, _ = configuration_of(cell.loaded.recipe.model)
        name_task(cell.loaded.recipe, config)
        with fake_processes(processes):
            fake = FakeRun(cell.loaded, config, conditions)
            meter = fake.step(1, cell.loaded.recipe.task.max_length)
        counts = fake.prepared.counts
        figures = {
            "whole_weights": fake.whole_weights_bytes,
            "own_weights": fake.weights_bytes,
            "held": fake.held_bytes,
            "trainable": counts.trainable_targets + counts.trainable_head,
        }
        for phase in STEP:
            peak = meter.peak(phase)
            assert peak is not None
            figures |= {f"{phase}.{name}": size for name, size in peak.categories.items()}
        figures |= {f"payload.{kind}": sent.payload_bytes for kind, sent in fake.sent.items()}
        found[cell.label] = figures
    return found


def sent_bytes(row: Row, kind: Kind, processes: int) -> int:
    """Return the bytes of a kind of collective that one process sends in a ring."""
    return Sent(1, row["bytes"][f"payload.{kind}"]).sent_bytes(kind, processes)


def at_peak(row: Row) -> dict[str, int]:
    """Return the categories at the highest peak of a step."""
    phases = {
        phase: {key.split(".")[1]: v for key, v in row["bytes"].items() if key.startswith(phase)}
        for phase in STEP
    }
    return max(phases.values(), key=lambda categories: sum(categories.values()))


# --- the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text."""
    lines = [" | ".join(head), " | ".join([":--", *["--:"] * (len(head) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def gib(count: float) -> str:
    """Return bytes in GiB, or in MiB below a tenth of a GiB."""
    if not count:
        return "0"
    return f"{count / GIB:,.1f}" if count >= GIB / 10 else f"{count / MIB:,.1f} MiB"


def memory_table(rows: Sequence[Row], model: str) -> str:
    """Return what a GPU holds under FSDP2, by method and number of GPUs."""
    lines = []
    for row in rows:
        if row["model"] != model or row["shard"] != "fsdp2":
            continue
        there, own, held = at_peak(row), row["bytes"]["own_weights"], row["bytes"]["held"]
        figures = (
            own,
            there["weights"] - held,
            there["bases"],
            held - own + there["gradients"] + there["optimizer_state"],
            there["saved_activations"] + there["other"],
            sum(there.values()),
        )
        lines.append([f"{row['method']}, {row['processes']} GPUs", *map(gib, figures)])
    head = ("", "own weights", "gathered", "bases", "trained and its state", "rest", "peak")
    return table(head, lines)


def sent_table(rows: Sequence[Row], shard: str) -> str:
    """Return what a GPU sends in a step, for every model and number of GPUs."""
    kinds, lines = tuple(RING), []
    for model in MODELS:
        for method in METHODS[shard]:
            mine = [
                row
                for row in rows
                if (row["model"], row["shard"], row["method"]) == (model, shard, method)
            ]
            if not mine:
                continue
            # What DDP reduces does not depend on the number of processes, so it is simulated once.
            by_count = dict.fromkeys(PROCESSES, mine[0]) | {row["processes"]: row for row in mine}
            total = [sum(sent_bytes(by_count[n], kind, n) for kind in kinds) for n in PROCESSES]
            last = [sent_bytes(by_count[PROCESSES[-1]], kind, PROCESSES[-1]) for kind in kinds]
            lines.append([f"{model}, {method}", *map(gib, total), *map(gib, last)])
    head = ("", *(f"{n} GPUs" for n in PROCESSES), *(kind.replace("_", "-") for kind in kinds))
    return table(head, lines)


def tables(rows: Sequence[Row]) -> dict[str, Callable[[], str]]:
    """Return name -> how to make the table of that name in the page."""
    made: dict[str, Callable[[], str]] = {
        f"memory {model}": partial(memory_table, rows, model) for model in MODELS
    }
    return made | {f"sent {shard}": partial(sent_table, rows, shard) for shard in METHODS}


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its tables made from the rows.

    Raises:
        KeyError: the page names a table that there is not.
    """
    made = tables(rows)

    def filled(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{made[found[1]]()}<!-- end -->"

    return re.sub(r"<!-- ((?:memory|sent) \w+) -->\n.*?<!-- end -->", filled, page, flags=re.S)


def main() -> None:
    """Parse the arguments; simulate, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--shards", default=",".join(METHODS))
    parser.add_argument("--processes", default=",".join(map(str, PROCESSES)))
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="blocks to simulate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write its tables from the rows in --out")
    options = parser.parse_args()
    if options.page is not None:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        page = with_tables(options.page.read_text(encoding="utf-8"), rows)
        options.page.write_text(page, encoding="utf-8")
        return
    rows = []
    counts = tuple(map(int, options.processes.split(",")))
    for model in options.models.split(","):
        for shard in options.shards.split(","):
            for processes in counts if shard == "fsdp2" else counts[:1]:
                rows += measure(model, shard, processes, list(map(int, options.depths.split(","))))
                save(options.out, "scaling", {"settings": SETTINGS, "rows": rows})


if __name__ == "__main__":
    main()
