"""What a report says of a calibration: its cost, and how well the basis holds the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from sparsegrad_cli.records.run import (
    CalibrationBlock,
    EnergyBlock,
    EnergyRow,
    EnergyShares,
    RunRecord,
    Spectrum,
    SupportShares,
)
from sparsegrad_cli.report import run_charts
from sparsegrad_cli.report.document import Block, Column, Fact, Facts, Figure, Paragraph, Table
from sparsegrad_cli.report.labels import ENERGY, SUPPORT_ENERGY
from sparsegrad_cli.report.units import (
    format_bytes,
    format_count,
    format_percent,
    format_seconds,
    format_share,
    words,
)

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


def calibration_blocks(run: RunRecord, *, with_facts: bool) -> list[Block | None]:
    """Return the section about calibration; empty for a training run without one.

    Args:
        run: the record.
        with_facts: begin with the cost. A calibration run shows it at the top of its page.
    """
    found = run.calibration
    if found is None:
        return [] if with_facts else [Paragraph("Calibration: not recorded.", dim=True)]
    target = f" Target: {found.heat_map.target}." if found.heat_map else ""
    return [
        Facts("Cost", calibration_facts(run)) if with_facts else None,
        support_energy(run),
        Figure(lambda: run_charts.energy_bars(_shares(run)), _ENERGY),
        energy_by_kind(run),
        energy_by_target(run),
        Figure(lambda: run_charts.gradient_maps(found.heat_map), _HEAT + target),
        Figure(lambda: run_charts.spectra_lines(found.spectra), _SPECTRA),
        spectra_table(run, folded="Directions that matter, by basis"),
    ]


def calibration_facts(run: RunRecord) -> list[Fact]:
    """Return how the basis was made and what that cost; empty for a run without calibration."""
    found = run.calibration
    if found is None:
        return []
    batches = f"batches of {format_count(found.batch_size)}" if found.batch_size is not None else ""
    if found.passes is not None and found.passes > 1:
        batches += f", {format_count(found.passes)} passes"
    made = f"from {found.source or '?'} gradients"
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


def support_means(run: RunRecord) -> Mapping[str, SupportShares]:
    """Return by layer kind the shares in the trained support and in the best in hindsight."""
    compared = _energy(run).compared
    return compared.mean_by_kind if compared else {}


def support_energy(run: RunRecord) -> Table | None:
    """Return the energy in the trained support beside the best in hindsight, with a verdict."""
    means = support_means(run)
    if not means:
        return None
    columns: list[Column[tuple[str, SupportShares]]] = [
        Column("kind", lambda row: row[0], words=True),
        Column("parameters", lambda row: format_count(row[1].count)),
        *(_support_column(key) for key in SUPPORT_ENERGY),
    ]
    compared = _energy(run).compared
    notes = [compared.verdict] if compared and compared.verdict else []
    caption = "Energy of held-out gradients in the same number of parameters of a target, %"
    return Table.of(list(means.items()), columns, caption, notes)


def _support_column(key: str) -> Column[tuple[str, SupportShares]]:
    return Column(SUPPORT_ENERGY[key], lambda row: format_percent(getattr(row[1], key)))


def energy_columns(run: RunRecord) -> list[str]:
    """Return the bases that were compared, worst first.

    Empty where bases are truncated and :func:`support_energy` has a table: the largest entries of
    a truncated core do not compare with those of a whole matrix.
    """
    energy = _energy(run)
    rows: list[EnergyShares] = [*energy.rows, *energy.mean_by_kind.values()]
    found = [key for key in ENERGY if any(getattr(row, key) is not None for row in rows)]
    return [] if "whole_core" in found and support_means(run) else found


def kind_means(run: RunRecord) -> dict[str, dict[str, float]]:
    """Return layer kind -> basis -> mean share, made from the rows where it is not recorded."""
    energy = _energy(run)
    groups: dict[str, Sequence[EnergyShares]] = {k: [v] for k, v in energy.mean_by_kind.items()}
    if not groups:
        kinds = dict.fromkeys(row.kind for row in energy.rows)
        groups = {kind: [row for row in energy.rows if row.kind == kind] for kind in kinds}
    return {
        kind: {
            key: fmean(values)
            for key in ENERGY
            if (values := [v for row in rows if (v := getattr(row, key)) is not None])
        }
        for kind, rows in groups.items()
    }


def energy_by_kind(run: RunRecord) -> Table | None:
    """Return the means over the targets of a kind, by basis."""
    keys, means = energy_columns(run), kind_means(run)
    if not keys or not means:
        return None
    header = ("kind", *(ENERGY[key] for key in keys))
    rows = [
        (kind, *(format_percent(shares.get(key)) for key in keys)) for kind, shares in means.items()
    ]
    return Table(_energy_caption(run), header, rows, (True, *(False for _ in keys)))


def _shares(run: RunRecord) -> dict[str, dict[str, float]]:
    """Return the shares that the figure shows: layer kind -> label -> share."""
    if support_means(run):
        return {
            kind: {label: getattr(means, key) or 0.0 for key, label in SUPPORT_ENERGY.items()}
            for kind, means in support_means(run).items()
        }
    keys = energy_columns(run)
    return {
        kind: {ENERGY[key]: means[key] for key in keys if key in means}
        for kind, means in kind_means(run).items()
    }


def energy_by_target(run: RunRecord) -> Table | None:
    """Return one row a target."""
    keys, rows = energy_columns(run), _energy(run).rows
    if not keys or not rows:
        return None

    def share(key: str) -> Column[EnergyRow]:
        return Column(ENERGY[key], lambda row: format_percent(getattr(row, key)))

    columns: list[Column[EnergyRow]] = [
        Column("target", lambda row: row.target, words=True),
        Column("kind", lambda row: row.kind, words=True),
        *(share(key) for key in keys),
    ]
    return Table.of(rows, columns, _energy_caption(run), folded="Energy of every target")


def _energy_caption(run: RunRecord) -> str:
    top = _energy(run).top
    part = f"top {format_share(top)} of" if top is not None else "top"
    return f"Squared gradient in the {part} entries by basis, % (held-out gradients)"


# --- spectra


def spectra_table(run: RunRecord, *, most: int | None = None, folded: str = "") -> Table | None:
    """Return how many directions carry the gradient: singular values above a share of the first.

    Args:
        run: the record.
        most: rows to show; a note counts the others.
        folded: the summary to fold the table under.
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
