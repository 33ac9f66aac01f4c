"""What a basis is worth, on gradients it never saw: energy shares, spectra, heat maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.calibration.calibrate import Calibration
from sparsegrad_cli.calibration.gradients import (
    Batch,
    as_in_training,
    gradient_step,
    gradients_only,
    tokens_only,
)
from sparsegrad_cli.interruption import raise_if_requested
from sparsegrad_cli.models.quantized import quantized_layers
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, GramStream, Stream
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.numerics.supports import energy_share
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.records.run import EnergyBlock, HeatMap, Side, Spectrum

TOP = 0.01
_HEAT_MAP_SIDE = 96
_SPECTRUM_LENGTH = 256


@dataclass(frozen=True)
class Choice:
    """What trains of a target.

    Attributes:
        basis: that it trains in, cut to the method's rank.
        full: the basis of full rank.
        count: parameters that train.
        support: their flat positions in the core; None for the largest ones of each gradient.
    """

    basis: Basis
    full: Basis
    count: int
    support: Tensor | None

    def energies(self, grad_OI: Tensor) -> dict[str, float]:
        """Shares of a gradient's energy in ``count`` entries, by how they are chosen.

        Returns:
            ``support``: those that train; ``full_basis`` and ``original``: the largest in
            hindsight in the basis of full rank and without a basis.
        """
        squares = to_core(grad_OI, self.basis).reshape(-1).double().square()
        if self.support is None:
            trained = torch.topk(squares, self.count, sorted=False).values
        else:
            trained = squares[self.support.to(squares.device, torch.int64)]
        total = grad_OI.double().square().sum()
        part = self.count / grad_OI.numel()
        return {
            "support": float(trained.sum() / total) if total > 0 else 0.0,
            "full_basis": energy_share(to_core(grad_OI, self.full), part),
            "original": energy_share(grad_OI, part),
        }


class KindGrams:
    """Sums per layer kind: the Gram of a union is the sum of Grams.

    One stream a kind is kept, so that those of single layers can be freed.

    Args:
        targets, keys: target name -> key of its basis.
    """

    def __init__(self, targets: list[Target], keys: Mapping[str, str]) -> None:
        self._kinds = {keys[t.name]: t.kind for t in targets}
        self._sums: dict[str, GramStream] = {}

    def add(self, key: str, stream: Stream) -> None:
        """Take a basis's sums, which may be changed; without Grams nothing is kept."""
        if not isinstance(stream, GramStream):
            return
        kind = self._kinds[key]
        if kind in self._sums:
            self._sums[kind].merge(stream)
        else:
            self._sums[kind] = stream

    def bases(self) -> dict[str, Basis]:
        """Kind -> basis of all directions."""
        bases = {}
        for kind, stream in self._sums.items():
            raise_if_requested(f"the basis of {kind}")
            bases[kind] = stream.basis()
        return bases


def energy_table(
    model: nn.Module,
    targets: list[Target],
    calibration: Calibration,
    batches: Iterator[Batch],
    *,
    steps: int,
    seed: int,
    per_kind: Mapping[str, Basis] | None = None,
    train: TrainSection | None = None,
    meter: Callable[[], AbstractContextManager[Any]] = nullcontext,
    choices: Mapping[str, Choice] | None = None,
) -> tuple[EnergyBlock, HeatMap]:
    """Mean share of squared entries in the top 1 % of held-out gradients, per target.

    Columns: ``original`` (no basis), ``transposed`` (Q_out' G Q_in', the published code; needs a
    basis of full rank), ``kind_basis`` (needs Grams, or a basis per kind) and, when calibrated per
    layer, ``layer_basis``. The 1 % is of the target's entries, and the share is of all its energy,
    also where the basis is truncated; ``whole_core`` is then what all entries of the core hold.

    Args:
        per_kind: bases of whole kinds (:class:`KindGrams`), where those calibrated are per layer.
        train: gradient checkpointing and autocast as in training.
        meter: context in which the first two steps are measured.
        choices: target name -> what trains of it; compared with as many entries chosen in
            hindsight, in the ``compared`` block.

    Returns:
        The ``energy`` and ``heat_map`` of the calibration block.
    """
    choices = choices or {}
    compared: dict[str, dict[str, float]] = {name: defaultdict(float) for name in choices}
    per_kind = per_kind or {}
    per_target = calibration.by_target()
    by_layer = any(calibration.keys[t.name] != t.kind for t in targets)
    sums: dict[str, dict[str, float]] = {t.name: defaultdict(float) for t in targets}
    maps: dict[str, Tensor] = {}
    shown = targets[len(targets) // 2].name

    def collect(target: Target, grad_OI: Tensor) -> None:
        grad, own = grad_OI.float(), per_target[target.name]
        bases = {"layer_basis" if by_layer else "kind_basis": own}
        if by_layer and target.kind in per_kind:
            bases["kind_basis"] = per_kind[target.kind]
        if own.q_in.shape[0] == own.q_in.shape[1]:
            bases["transposed"] = replace(own, q_in=own.q_in.T)
        cores = {name: to_core(grad, basis) for name, basis in bases.items()}
        cores["original"] = grad
        for name, core in cores.items():
            sums[target.name][name] += energy_share(core, TOP, whole=grad) / steps
        own_core = cores["layer_basis" if by_layer else "kind_basis"]
        if own_core.numel() < grad.numel():
            sums[target.name]["whole_core"] += energy_share(own_core, 1.0, whole=grad) / steps
        if target.name in choices:
            for name, share in choices[target.name].energies(grad).items():
                compared[target.name][name] += share / steps
        if target.name == shown:
            for name, core in (("original", grad), ("basis", to_core(grad, own))):
                pooled = _pool(core.abs())
                maps[name] = maps[name] + pooled if name in maps else pooled

    def collect_tokens(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        collect(target, g_NO.float().T @ x_NI.float())

    with as_in_training(model, train) as scale, temporary_seed(seed):
        hooks = gradients_only(model, targets, collect, scale=scale)
        if quantized_layers(model):  # whose weights have no gradient
            hooks = tokens_only(model, targets, collect_tokens, scale=scale)
        with hooks:
            for step in range(1, steps + 1):
                with meter() if step <= 2 else nullcontext():
                    gradient_step(model, next(batches), step, scale=scale)
    rows = [{"target": t.name, "kind": t.kind, **sums[t.name]} for t in targets]
    energy: dict[str, Any] = {"top": TOP, "steps": steps, "rows": rows}
    energy["mean_by_kind"] = _mean_by_kind(rows)
    if choices:
        against = [
            {"target": t.name, "kind": t.kind, "count": choices[t.name].count, **compared[t.name]}
            for t in targets
            if t.name in choices
        ]
        means = _mean_by_kind(against)
        verdict = verdict_of(means)
        energy["compared"] = {"rows": against, "mean_by_kind": means, "verdict": verdict}
    original, basis = ((maps[name] / steps).tolist() for name in ("original", "basis"))
    heat_map = HeatMap(target=shown, original=original, basis=basis)
    return EnergyBlock.model_validate(energy), heat_map


def verdict_of(means: Mapping[str, Mapping[str, float]]) -> str:
    """One sentence: what the support that trains catches, beside the best in hindsight."""

    def mean(name: str) -> float:
        return 100 * sum(row[name] for row in means.values()) / len(means)

    support, full, original = mean("support"), mean("full_basis"), mean("original")
    figures = (
        f"the support that trains holds {support:.1f} % of the energy of held-out gradients, the "
        f"same number of parameters chosen in hindsight {full:.1f} % in the full-rank basis and "
        f"{original:.1f} % in the original one"
    )
    if support > original:
        return f"The support pays: {figures}."
    if full > original:
        return (
            "The basis concentrates the gradients, but the support that trains catches less than "
            f"as many original parameters chosen in hindsight: {figures}."
        )
    return f"The basis does not pay on these gradients: {figures}."


def _mean_by_kind(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    names = [name for name in rows[0] if name not in ("target", "kind")]
    return {
        kind: {name: sum(row[name] for row in group) / len(group) for name in names}
        for kind, group in kinds.items()
    }


def _pool(matrix: Tensor) -> Tensor:
    """Mean of |entries| over at most 96 x 96 cells, on the CPU."""
    rows, columns = (min(side, _HEAT_MAP_SIDE) for side in matrix.shape)
    pooled = F.adaptive_avg_pool2d(matrix[None, None], (rows, columns))[0, 0]
    return pooled.to("cpu", torch.float32)


def spectra(bases: dict[str, Basis]) -> list[Spectrum]:
    """Return singular values divided by the first, strongest first, at most 256 a side."""
    found = []
    for key, basis in bases.items():
        sides: tuple[tuple[Side, Tensor], ...] = (
            ("out", basis.singular_out),
            ("in", basis.singular_in),
        )
        for side, values in sides:
            scaled = (values / values[0].clamp_min(1e-30))[:_SPECTRUM_LENGTH]
            found.append(Spectrum(key=key, side=side, values=[float(v) for v in scaled]))
    return found
