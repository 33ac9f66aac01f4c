"""Calibration and provenance of a record, as facts and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.report.access import block, dig, mappings, number, numbers, step_number, text
from sparsegrad_cli.report.labels import ENERGY, SUPPORT_ENERGY
from sparsegrad_cli.report.tables import Cell, Fact, Table
from sparsegrad_cli.report.units import format_bytes, format_count, format_seconds, format_share

_CALIBRATION = {
    "steps": "steps",
    "batch_size": "batch size",
    "source": "Gram source",
    "basis_per": "one basis per",
    "basis_file": "basis file",
}
_HASH_LABELS = {"data": "data", "head_init": "head initialisation", "precision": "precision"}
# What cells of one comparison can differ in, though their recipes do not.
_OF_CELLS = {
    "commit": ("git", "commit"),
    "device": ("environment", "device"),
    "device name": ("environment", "device_name"),
    "threads": ("environment", "threads"),
    "torch": ("environment", "packages", "torch"),
}


def calibration_facts(run: Any) -> list[Fact]:
    """How the basis was made and what that cost; empty for a run without calibration."""
    found = block(run, "calibration")
    if not found:
        return []
    shown = [Fact("Time", format_seconds(number(found, "seconds")))]
    shown.append(Fact("Peak memory", format_bytes(number(found, "peak_bytes"))))
    size = number(found, "basis_bytes")
    shown.append(Fact("Basis on disk", format_bytes(size), text(found, "basis_file") or ""))
    steps, batch = number(found, "steps"), number(found, "batch_size")
    of = f"batches of {format_count(batch)}" if batch is not None else ""
    passes = number(found, "passes")
    if passes is not None and passes > 1:
        of += f", {format_count(passes)} passes"
    shown.append(Fact("Gradient steps", format_count(steps), of))
    per, source = text(found, "basis_per"), text(found, "source")
    way = text(found, "decomposition")
    made = f"from {source or '?'} gradients" + (f", {way}" if way else "")
    shown.append(Fact("One basis per", per or "not recorded", made))
    score = text(found, "score")
    if score and score != "spectral":
        shown.append(Fact("Support by", score))
    reused = dig(found, "reused")
    if reused is not None:
        shown.append(Fact("Reused", "yes" if reused else "no"))
    return shown


def support_means(run: Any) -> dict[str, Mapping[str, Any]]:
    """Layer kind to mean shares in the support that trains and in the best in hindsight."""
    kinds = block(run, "calibration", "energy", "compared", "mean_by_kind").items()
    return {printable_line(str(kind)): mean for kind, mean in kinds if isinstance(mean, Mapping)}


def support_energy(run: Any) -> Table | None:
    """Energy in the support that trains, beside the best in hindsight, by kind; and a verdict."""
    rows: list[tuple[Cell, ...]] = []
    for kind, means in support_means(run).items():
        count = number(means, "count")
        words = format_count(count) if count is not None else None
        rows.append((kind, words, *_shares(means, list(SUPPORT_ENERGY))))
    if not rows:
        return None
    caption = "Energy of held-out gradients in the same number of parameters of a target, %"
    verdict = text(run, "calibration", "energy", "compared", "verdict")
    header = ("kind", "parameters", *SUPPORT_ENERGY.values())
    return Table(caption, header, rows, notes=[verdict] if verdict else [])


def energy_columns(run: Any) -> list[str]:
    """The columns of the table by basis that were computed, worst first.

    None where bases are truncated and :func:`support_energy` is there: the largest entries of a
    truncated core do not compare with those of a whole matrix.
    """
    energy = block(run, "calibration", "energy")
    rows: list[Any] = [*mappings(energy, "rows"), *block(energy, "mean_by_kind").values()]
    found = [key for key in ENERGY if any(number(row, key) is not None for row in rows)]
    return [] if "whole_core" in found and block(energy, "compared", "mean_by_kind") else found


def energy_caption(run: Any) -> str:
    """What the shares are shares of."""
    top = number(run, "calibration", "energy", "top")
    part = f"top {format_share(top)} of" if top is not None else "top"
    return f"Squared gradient in the {part} entries by basis, % (held-out gradients)"


def energy_by_kind(run: Any) -> Table | None:
    """Means over the targets of a kind; recomputed from the rows where the record has none."""
    columns, means = energy_columns(run), kind_means(run)
    if not columns or not means:
        return None
    rows = [(kind, *_shares(row, columns)) for kind, row in means.items()]
    return Table(energy_caption(run), ("kind", *(ENERGY[c] for c in columns)), rows)


def kind_means(run: Any) -> dict[str, Mapping[str, Any]]:
    """Layer kind to mean share per column."""
    energy = block(run, "calibration", "energy")
    kinds = block(energy, "mean_by_kind").items()
    means = {printable_line(str(kind)): mean for kind, mean in kinds if isinstance(mean, Mapping)}
    if means:
        return means
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in mappings(energy, "rows"):
        groups.setdefault(text(row, "kind") or "all", []).append(row)
    return {kind: _mean(rows) for kind, rows in groups.items()}


def _mean(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for key in ENERGY:
        values = [v for v in (number(row, key) for row in rows) if v is not None]
        if values:
            found[key] = sum(values) / len(values)
    return found


def energy_by_target(run: Any) -> Table | None:
    """One row a target."""
    columns = energy_columns(run)
    rows: list[tuple[Cell, ...]] = [
        (text(row, "target"), text(row, "kind"), *_shares(row, columns))
        for row in mappings(run, "calibration", "energy", "rows")
    ]
    if not rows or not columns:
        return None
    header = ("target", "kind", *(ENERGY[c] for c in columns))
    return Table(energy_caption(run), header, rows, left=2)


def _shares(row: Any, columns: list[str]) -> list[Cell]:
    values = [number(row, column) for column in columns]
    return [None if v is None else f"{100 * v:.1f}" for v in values]


def spectra_table(run: Any) -> Table | None:
    """How many directions carry the gradient: singular values above a share of the first."""
    rows: list[tuple[Cell, ...]] = []
    for item in mappings(run, "calibration", "spectra"):
        values = numbers(item, "values")
        if values:
            counts = [_above(values, share) for share in (0.1, 0.01)]
            rows.append((text(item, "key"), text(item, "side"), *counts))
    if not rows:
        return None
    header = ("basis", "side", "≥\u00a010\u00a0%", "≥\u00a01\u00a0%")
    caption = "Singular values of the calibration gradients at least 10 % and 1 % of the first"
    return Table(caption, header, rows, left=2)


def _above(values: list[float], share: float) -> str:
    count = sum(value >= share * values[0] for value in values)
    return f"≥ {count}" if count == len(values) and count > 1 else str(count)


def provenance(record: Any) -> Table:
    """Where a record comes from: machine, versions, recipe, code, hashes."""
    found: list[tuple[str, Cell]] = []
    environment = block(record, "environment")
    for label, keys in (
        ("started", ("started",)),
        ("finished", ("finished",)),
        ("command", ("command",)),
        ("recipe digest", ("recipe_digest",)),
        ("model fingerprint", ("model", "fingerprint")),
        ("output_dir", ("output_dir",)),
        ("matched by", ("match",)),
        ("cells at once", ("jobs",)),
        ("commit", ("git", "commit")),
    ):
        if label in ("started", "finished", "commit") or text(record, *keys):
            found.append((label, text(record, *keys)))
    if dig(record, "git", "dirty") is True:
        found.append(("uncommitted changes", "yes: the commit does not describe the code fully"))
    for key in ("python", "platform", "cpu", "device", "device_name", "threads"):
        if text(environment, key):
            found.append((key.replace("_", " "), text(environment, key)))
    for package, version in block(environment, "packages").items():
        if text(version):
            found.append((printable_line(str(package)), text(version)))
    found += [*_cells(record), *_precision(record), *_hashes(record)]
    return Table("Provenance", ("what", "value"), found, left=2)


def _cells(record: Any) -> list[tuple[str, Cell]]:
    """Where a comparison's cells ran: ``1 (20 cells), 2 (4 cells)`` where they are not of one."""
    runs = [run for run in (block(cell, "run") for cell in mappings(record, "cells")) if run]
    found: list[tuple[str, Cell]] = []
    for label, keys in _OF_CELLS.items():
        counts = Counter(value for run in runs if (value := text(run, *keys)) is not None)
        parts = [f"{value} ({count} cells)" for value, count in counts.items()]
        if parts:
            found.append(
                (f"{label} of cells", next(iter(counts)) if len(counts) == 1 else ", ".join(parts))
            )
    return found


def _precision(record: Any) -> list[tuple[str, Cell]]:
    found = block(record, "precision")
    if not found:
        return []
    dtypes = " and ".join(printable_line(str(name)) for name in block(found, "weights"))
    autocast = text(found, "autocast") or "no"
    return [("precision", f"{dtypes} weights, {autocast} autocast, {text(found, 'matmul')} matmul")]


def _hashes(record: Any) -> list[tuple[str, Cell]]:
    hashes = block(record, "hashes")
    found = [
        (f"hash of {label}", text(hashes, key))
        for key, label in _HASH_LABELS.items()
        if text(hashes, key)
    ]
    order = block(hashes, "order")
    last = max(filter(None, map(step_number, order)), default=None)
    if last is not None:
        found.append((f"hash of order, {last:,} steps", text(order, str(last))))
    if text(record, "calibration", "digest"):
        found.append(("hash of basis", text(record, "calibration", "digest")))
    return [(label, value) for label, value in found]
