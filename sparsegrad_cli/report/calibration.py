"""Build the calibration section: its cost, and how well the basis captures the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from sparsegrad_cli.records.run import (
    CalibrationBlock,
    ComparedBlock,
    EnergyBlock,
    EnergyShares,
    HeatMap,
    RunRecord,
    Spectrum,
    SupportShares,
)
from sparsegrad_cli.report import run_charts
from sparsegrad_cli.report.document import Block, Column, Fact, Facts, Figure, Paragraph, Table
from sparsegrad_cli.report.units import (
    format_bytes,
    format_count,
    format_percent,
    format_seconds,
    format_share,
    words,
)

NamedShares = tuple[str, EnergyShares | SupportShares]

# Fields of the shares -> labels of their columns.
_SUPPORTS = {
    "support": "trained support",
    "full_basis": "best in full-rank basis",
    "original": "best in original basis",
}
_BASES = {
    "original": "original",
    "transposed": "published code",
    "kind_basis": "per kind",
    "layer_basis": "per layer",
    "whole_core": "whole core",
}

_ENERGY = (
    "How much of the squared norm of a gradient a given number of its entries hold, measured on "
    "gradients that calibration never saw. Higher is better. Trained support: the parameters that "
    "this method changes. Best in a basis: as many entries, chosen in hindsight for each gradient, "
    "in the full-rank basis and in the original one (no basis). Where bases are compared instead, "
    "published code applies the basis with its sides swapped; per kind and per layer, one basis is "
    "shared by all layers of a kind, or each layer has its own."
)
_SPECTRA = (
    "Singular values of the calibration gradients, by side. The faster they fall, the fewer "
    "directions carry the gradient and the sparser its core can be."
)
_HEAT = (
    "Mean absolute entries of one weight gradient; darker is smaller. In the original basis they "
    "are spread out; in the core, sorted by singular value, they gather in the top left corner."
)
_SOURCES = {
    "batch": "gradients of batches",
    "token": "g and x of tokens",
    "token_gradient": "gradients of tokens",
    "random": "random numbers",
    "original": "the identity",
}


def calibration_blocks(run: RunRecord, *, with_facts: bool) -> list[Block | None]:
    """Return the blocks about calibration; empty for a training run without one.

    Args:
        run: the record.
        with_facts: begin with the cost. A calibration run shows it at the top of its page.
    """
    found = run.calibration
    if found is None:
        return [] if with_facts else [Paragraph("Calibration: not recorded.", dim=True)]
    target = f" Target: {found.heat_map.target}." if found.heat_map else ""
    shares = _shown_shares(run)
    return [
        Facts("Cost", calibration_facts(run)) if with_facts else None,
        support_energy(run),
        Figure(
            "Energy of held-out gradients",
            lambda: run_charts.energy_bars(shares),
            _ENERGY,
            _energy_alt(shares),
        ),
        energy_by_kind(run),
        energy_by_target(run),
        Figure(
            "One gradient without and in the basis",
            lambda: run_charts.gradient_maps(found.heat_map),
            _HEAT + target,
            _maps_alt(found.heat_map),
        ),
        Figure(
            "Singular values of the calibration gradients",
            lambda: run_charts.spectra_lines(found.spectra),
            _SPECTRA,
            _spectra_alt(found.spectra),
        ),
        spectra_table(run, folded="Directions that matter, by basis"),
    ]


def _energy_alt(shares: Mapping[str, Mapping[str, float]]) -> str:
    parts = [
        f"{kind}: " + ", ".join(f"{label} {format_share(each)}" for label, each in found.items())
        for kind, found in shares.items()
    ]
    return f"Energy of held-out gradients. {'; '.join(parts)}." if parts else ""


def _maps_alt(found: HeatMap | None) -> str:
    """Return how much of each map's sum lies in its top left quarter."""
    if found is None:
        return ""
    parts = []
    for name, matrix in (("original basis", found.original), ("core", found.basis)):
        rows = [[abs(value or 0.0) for value in row] for row in matrix]
        total = sum(map(sum, rows))
        corner = sum(sum(row[: (len(row) + 1) // 2]) for row in rows[: (len(rows) + 1) // 2])
        if total:
            parts.append(f"{format_share(corner / total)} in the {name}")
    return f"Share of the entries' sum in the top left quarter: {', '.join(parts)}."


def _spectra_alt(spectra: Sequence[Spectrum]) -> str:
    counts = [
        sum(value >= 0.1 * values[0] for value in values)
        for one in spectra
        if (values := _values(one))
    ]
    if not counts:
        return ""
    return (
        f"{min(counts)} to {max(counts)} directions of a basis have singular values of at least "
        "10 % of the first."
    )


def calibration_facts(run: RunRecord) -> list[Fact]:
    """Return how the basis was computed and its cost; empty for a run without calibration."""
    found = run.calibration
    if found is None:
        return []
    batches = f"batches of {format_count(found.batch_size)}" if found.batch_size is not None else ""
    if found.passes is not None and found.passes > 1:
        batches += f", {format_count(found.passes)} passes"
    made = f"from {_SOURCES.get(found.source or '', '?')}"
    made += f", {found.decomposition}" if found.decomposition else ""
    facts = [
        Fact("Time", format_seconds(found.seconds)),
        Fact("Peak memory", format_bytes(found.peak_bytes)),
        Fact("Basis on disk", format_bytes(found.basis_bytes), found.basis_file or ""),
        Fact("Gradient steps", format_count(found.steps), batches),
        Fact("One basis per", words(found.basis_per), made),
    ]
    if found.score and found.score != "spectral":
        facts.append(Fact("Support chosen by", found.score))
    return [*facts, Fact("Basis reused", words(found.reused))]


# --- energy


def _energy(run: RunRecord) -> EnergyBlock:
    calibration = run.calibration or CalibrationBlock()
    return calibration.energy or EnergyBlock()


def _compared(run: RunRecord) -> ComparedBlock:
    return _energy(run).compared or ComparedBlock()


def _share_columns(labels: Mapping[str, str]) -> list[Column[NamedShares]]:
    """Return one column for each field of the shares, in percent."""
    return [Column(label, partial(_share, key)) for key, label in labels.items()]


def _share(key: str, row: NamedShares) -> str:
    return format_percent(getattr(row[1], key))


def support_energy(run: RunRecord) -> Table | None:
    """Return the energy in the trained support and in the best one in hindsight, with a verdict."""
    compared = _compared(run)
    columns: list[Column[NamedShares]] = [
        Column("kind", lambda row: row[0], words=True),
        Column("parameters", lambda row: format_count(getattr(row[1], "count", None))),
        *_share_columns(_SUPPORTS),
    ]
    notes = [compared.verdict] if compared.verdict else []
    caption = "Energy of held-out gradients in the same number of parameters of a target, %"
    rows: list[NamedShares] = list(compared.mean_by_kind.items())
    return Table.of(rows, columns, caption, notes) if rows else None


def _bases(run: RunRecord) -> dict[str, str]:
    """Return the bases that were compared, worst first: field -> label.

    Empty if bases are truncated and :func:`support_energy` has a table, because the largest entries
    of a truncated core are not comparable with those of a whole matrix.
    """
    rows = _energy(run).rows
    found = {k: v for k, v in _BASES.items() if any(getattr(row, k) is not None for row in rows)}
    return {} if "whole_core" in found and _compared(run).mean_by_kind else found


def energy_by_kind(run: RunRecord) -> Table | None:
    """Return the means over the target modules of each kind, by basis."""
    bases, rows = _bases(run), list[NamedShares](_energy(run).mean_by_kind.items())
    kind: Column[NamedShares] = Column("kind", lambda row: row[0], words=True)
    columns = [kind, *_share_columns(bases)]
    return Table.of(rows, columns, _energy_caption(run)) if bases and rows else None


def energy_by_target(run: RunRecord) -> Table | None:
    """Return one row per target module, by basis."""
    bases, rows = _bases(run), [(row.target, row) for row in _energy(run).rows]
    columns: list[Column[NamedShares]] = [
        Column("target", lambda row: row[0], words=True),
        Column("kind", lambda row: getattr(row[1], "kind", ""), words=True),
        *_share_columns(bases),
    ]
    caption, folded = _energy_caption(run), "Energy of every target"
    return Table.of(rows, columns, caption, folded=folded) if bases else None


def _shown_shares(run: RunRecord) -> dict[str, dict[str, float]]:
    """Return the shares that the figure shows: layer kind -> label -> share."""
    compared = _compared(run).mean_by_kind
    labels = _SUPPORTS if compared else _bases(run)
    means: Mapping[str, EnergyShares | SupportShares] = compared or _energy(run).mean_by_kind
    return {
        kind: {label: getattr(shares, key) or 0.0 for key, label in labels.items()}
        for kind, shares in means.items()
    }


def _energy_caption(run: RunRecord) -> str:
    top = _energy(run).top
    part = f"top {format_share(top)} of" if top is not None else "top"
    return f"Squared gradient in the {part} entries by basis, % (held-out gradients)"


# --- spectra


def spectra_table(run: RunRecord, *, most: int | None = None, folded: str = "") -> Table | None:
    """Return the number of singular values above some shares of the first one.

    Args:
        run: the record.
        most: the number of rows to show; a note counts the others.
        folded: the summary line of the folded table.
    """
    spectra = [one for one in (run.calibration or CalibrationBlock()).spectra if _values(one)]
    if not spectra:
        return None
    columns: list[Column[Spectrum]] = [
        Column("basis", lambda one: one.key, words=True),
        Column("side", lambda one: one.side, words=True),
        Column("≥\u00a010\u00a0%", lambda one: _above(_values(one), 0.1)),
        Column("≥\u00a01\u00a0%", lambda one: _above(_values(one), 0.01)),
    ]
    more = len(spectra) - most if most is not None else 0
    notes = [f"and {more} more in the report"] if more > 0 else []
    caption = "Singular values of the calibration gradients at least 10 % and 1 % of the first"
    return Table.of(spectra[:most], columns, caption, notes, folded)


def _values(spectrum: Spectrum) -> list[float]:
    return [value for value in spectrum.values if value is not None]


def _above(values: Sequence[float], share: float) -> str:
    count = sum(value >= share * values[0] for value in values)
    return f"≥ {count}" if count == len(values) and count > 1 else str(count)
