"""Memory of one GPU and bytes that it sends, for LLaMA-2 of 7B to 70B on 8 to 512 GPUs, simulated.

Nothing is downloaded and no weights are allocated. Each row is a fake run
(``sparsegrad estimate --processes N --shard fsdp2``) on fake processes. With ``--page`` the tables
of docs/explanation/scaling.md are written anew from the saved rows.

python -m benchmarks.scaling --out docs/results/scaling.json
python -m benchmarks.scaling --page docs/explanation/scaling.md --out docs/results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save
from sparsegrad_cli.estimate.estimate_steps import estimate_steps
from sparsegrad_cli.estimate.fake_run import Conditions
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
Row = dict[str, Any]


def measure(model: str, shard: Any, processes: int) -> list[Row]:
    """Return a row for each method."""
    settings = (f"model.name={MODELS[model]}", *SETTINGS)
    study = make_study(None, METHODS[shard], 1, settings, option="--method")
    cells = [(cell.label, cell.loaded) for cell in study.cells]
    conditions = Conditions(kernels="cuda", padded=False, processes=processes, shard=shard)
    rows = []
    for row in estimate_steps(cells, conditions).rows:
        found = row.to_json()
        kept = ("label", "counts", "peak_bytes", "peak_phase", "categories", "share", "seconds")
        kept = (*kept, "calibrate_peak_bytes", "beyond_weights_bytes", "notes")
        rows.append(
            {"model": model, "shard": shard, "processes": processes}
            | {key: found[key] for key in kept if key in found}
        )
        print(model, shard, processes, row.label, round(row.seconds or 0, 1), file=sys.stderr)
    return rows


# --- the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text."""
    lines = [" | ".join(head), " | ".join([":--", *["--:"] * (len(head) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def gib(count: float) -> str:
    """Return bytes in GiB, or in MiB below a tenth of a GiB."""
    return f"{count / GIB:,.1f}" if count >= GIB / 10 else f"{count / MIB:,.1f} MiB"


def memory_table(rows: Sequence[Row], model: str) -> str:
    """Return what a GPU holds, by method and number of GPUs."""
    lines = []
    for row in rows:
        if row["model"] != model or row["shard"] != "fsdp2":
            continue
        held = row["categories"]
        between = held["weights"] - row["share"]["gathered_bytes"]
        state = held["adapter"] + held["gradients"] + held["optimizer_state"]
        rest = held["saved_activations"] + held["other"]
        lines.append(
            [
                f"{row['label']}, {row['processes']} GPUs",
                *map(
                    gib,
                    (
                        between,
                        row["share"]["gathered_bytes"],
                        held["bases"],
                        state,
                        rest,
                        row["peak_bytes"],
                    ),
                ),
            ]
        )
    head = ("", "own weights", "gathered", "bases", "trained, gradients, state", "rest", "peak")
    return table(head, lines)


def sent_table(rows: Sequence[Row], shard: str) -> str:
    """Return what a GPU sends in a step, for every model and number of GPUs."""
    lines = []
    for model in MODELS:
        for method in METHODS[shard]:
            mine = [
                r for r in rows if (r["model"], r["shard"], r["label"]) == (model, shard, method)
            ]
            by_count = {r["processes"]: r["share"] for r in mine}
            if not by_count:
                continue
            sent = [gib(by_count[n]["sent_bytes"]) if n in by_count else "" for n in PROCESSES]
            last = by_count[max(by_count)]["collectives"]
            kinds = {c["kind"]: gib(c["sent_bytes"]) for c in last}
            order = ("all_gather", "reduce_scatter", "all_reduce")
            lines.append([f"{model}, {method}", *sent, *(kinds.get(kind, "0") for kind in order)])
    head = ("", *(f"{n} GPUs" for n in PROCESSES), "all-gather", "reduce-scatter", "all-reduce")
    return table(head, lines)


def tables(rows: Sequence[Row]) -> dict[str, Callable[[], str]]:
    """Return name -> how to make the table of that name in the page."""
    named = {f"memory {model}": lambda model=model: memory_table(rows, model) for model in MODELS}
    return named | {
        f"sent {shard}": lambda shard=shard: sent_table(rows, shard) for shard in METHODS
    }


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its tables made anew from the rows.

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
    parser.add_argument("--processes", default=",".join(map(str, PROCESSES)))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write its tables from the rows in --out")
    options = parser.parse_args()
    if options.page is not None:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        page = with_tables(options.page.read_text(encoding="utf-8"), rows)
        options.page.write_text(page, encoding="utf-8")
        return
    rows = []
    for model in options.models.split(","):
        for shard in METHODS:
            for processes in map(int, options.processes.split(",")):
                rows += measure(model, shard, processes)
                save(options.out, "scaling", {"settings": SETTINGS, "rows": rows})


if __name__ == "__main__":
    main()
