"""The page of a training or calibration run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.records.store import write_text_atomic
from sparsegrad_cli.report import run_charts
from sparsegrad_cli.report.access import text
from sparsegrad_cli.report.page import (
    bullets,
    cards,
    drawing,
    folded,
    html_table,
    page,
    paragraph,
)
from sparsegrad_cli.report.record_tables import (
    calibration_facts,
    energy_by_kind,
    energy_by_target,
    provenance,
    spectra_table,
    support_energy,
)
from sparsegrad_cli.report.run_tables import (
    facts,
    memory_table,
    notes_of,
    targets_table,
    time_line,
)
from sparsegrad_cli.report.sparsity_charts import sparsity_map

_LEARNING = (
    "Score on the validation split at every evaluation, starting before the first step. The dotted "
    "line is what always answering with the most frequent class scores: a method that stays on it "
    "has learnt nothing. The ring marks the model that is kept."
)
_LOSS = (
    "Cross-entropy (mean squared error for regression). Training loss that falls while validation "
    "loss climbs is overfitting."
)
_MEMORY = (
    "What was held at the moment each phase needed most, by what it was held for. Forward, "
    "backward and optimizer make up a training step; the highest of the three decides whether it "
    "fits. RSS, in the table, is all that the process holds, libraries included."
)
_TIME = "Where the time went. Calibration is part of what SparseGrad costs, and is charged to it."
_ENERGY = (
    "How much of a gradient's squared norm a number of its entries hold, on gradients the basis "
    "never saw. Higher is better. Support that trains: the parameters that this method changes. "
    "Best in a basis: as many, chosen in hindsight for each gradient, in the basis of full rank "
    "and in the original one (no basis). Where entries are compared by basis instead, published "
    "code is the basis put on with its sides swapped; per kind and per layer, one basis shared by "
    "all layers of a kind, or one per layer."
)
_SPECTRA = (
    "Singular values of the calibration gradients, by side. The faster they fall, the fewer "
    "directions carry the gradient and the sparser its core can be."
)
_HEAT = (
    "One weight gradient, mean absolute entries, darker is smaller. In the original basis it is "
    "spread out; as a core, sorted by singular value, it gathers in the top left corner."
)
_TOUCHED = (
    "Where the entries lie that were touched in any step: the share of each block of one matrix, a "
    "core sorted by singular value, or the weight itself."
)


def write_run_html(record: Mapping[str, Any], path: Path) -> None:
    """Write the page of a training or calibration run.

    Args:
        record: ``run.json`` as loaded; anything may be missing.
        path: the file to write.

    Raises:
        DiskError: the file could not be written.
    """
    trained = text(record, "command") != "calibrate"
    lead = cards(facts(record) if trained else calibration_facts(record))
    sections = [
        ("Learning", _learning(record) if trained else ""),
        ("Calibration", _calibration(record, with_facts=trained)),
        ("Memory", _memory(record)),
        ("Time", _time(record)),
        ("Trainable entries", _entries(record)),
        ("Notes", bullets(notes_of(record))),
        ("Provenance", html_table(provenance(record))),
    ]
    write_text_atomic(path, page(record, sections, lead))


def _learning(record: Mapping[str, Any]) -> str:
    curve = drawing(run_charts.learning_curve(record), _LEARNING, "Scores: not recorded.")
    return curve + drawing(run_charts.loss_curve(record), _LOSS, "Losses: not recorded.")


def _memory(record: Mapping[str, Any]) -> str:
    bars = drawing(run_charts.memory_bars(record), _MEMORY)
    return bars + html_table(memory_table(record), "Memory: not recorded.")


def _time(record: Mapping[str, Any]) -> str:
    line = paragraph(time_line(record) or "Not recorded.", dim=True)
    return drawing(run_charts.time_bar(record), _TIME) + line


def _entries(record: Mapping[str, Any]) -> str:
    where = drawing(sparsity_map(record), _map_caption(record))
    return where + folded("Every target", html_table(targets_table(record)))


def _map_caption(record: Mapping[str, Any]) -> str:
    target = text(record, "sparsity", "target")
    return f"{_TOUCHED} Target: {target}." if target else _TOUCHED


def _calibration(record: Mapping[str, Any], *, with_facts: bool) -> str:
    shown = calibration_facts(record)
    if not shown:
        return "" if with_facts else paragraph("Calibration: not recorded.", dim=True)
    parts = [cards(shown)] if with_facts else []
    parts.append(html_table(support_energy(record)))
    parts += [drawing(run_charts.energy_bars(record), _ENERGY), html_table(energy_by_kind(record))]
    parts.append(folded("Energy of every target", html_table(energy_by_target(record))))
    parts.append(drawing(run_charts.heat_maps(record), _heat_caption(record)))
    parts.append(drawing(run_charts.spectra_lines(record), _SPECTRA))
    parts.append(folded("Directions that matter, by basis", html_table(spectra_table(record))))
    return "".join(parts)


def _heat_caption(record: Mapping[str, Any]) -> str:
    target = text(record, "calibration", "heat_map", "target")
    return f"{_HEAT} Target: {target}." if target else _HEAT
