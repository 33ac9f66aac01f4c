"""Measure a basis on held-out gradients: energy shares, spectra, heat maps."""

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
    """The trained parameters of a target.

    Attributes:
        basis: the basis that the target trains in, cut to the method's rank.
        full: the full-rank basis.
        count: number of trained parameters.
        support: their flat positions in the core; None if each step trains those with the largest
            gradient entries.
    """

    basis: Basis
    full: Basis
    count: int
    support: Tensor | None

    def energies(self, grad_OI: Tensor) -> dict[str, float]:
        """Return the shares of a gradient's energy in ``count`` entries, by choice of entries.

        Returns:
            The share in the trained entries (``support``), and in the largest entries in hindsight,
            in the full-rank basis (``full_basis``) and without a basis (``original``).
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
    """Gram matrices summed per layer kind.

    The Gram matrix of a union of gradients is the sum of their Gram matrices. One stream per kind
    is kept, so that the streams of single layers can be freed.

    Args:
        targets: the target modules.
        keys: target name -> key of its basis.
    """

    def __init__(self, targets: list[Target], keys: Mapping[str, str]) -> None:
        self._kinds = {keys[t.name]: t.kind for t in targets}
        self._sums: dict[str, GramStream] = {}

    def add(self, key: str, stream: Stream) -> None:
        """Add the sums of a basis, which may be modified; sums that are not Grams are ignored."""
        if not isinstance(stream, GramStream):
            return
        kind = self._kinds[key]
        if kind in self._sums:
            self._sums[kind].merge(stream)
        else:
            self._sums[kind] = stream

    def bases(self) -> dict[str, Basis]:
        """Return kind -> full-rank basis."""
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
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[EnergyBlock, HeatMap]:
    """Measure the share of squared entries in the top 1 % of held-out gradients, per target.

    The columns are:

    - ``original``: without a basis.
    - ``transposed``: Q_out' G Q_in', as in the published code. It needs a full-rank basis.
    - ``kind_basis``: in the basis of the layer kind. It needs Grams or a basis per kind.
    - ``layer_basis``: in the basis of the layer, if the calibration is per layer.
    - ``whole_core``: the share of energy in the whole core, if the basis is truncated.

    The 1 % counts parameters of the target. All shares are relative to the whole energy of the
    target's gradient, also if the basis is truncated.

    Args:
        model: the model that was calibrated.
        targets: its target modules.
        calibration: the bases.
        batches: yields at least ``steps`` held-out batches on the model's device.
        steps: number of gradients per target.
        seed: seed of dropout; the global random state is restored.
        per_kind: bases of whole kinds (:class:`KindGrams`), if the calibrated ones are per layer.
        train: settings of gradient checkpointing and autocast; None for neither.
        meter: context in which the first two steps are measured.
        on_step: called with the number and loss of each step.
        choices: target name -> its trained parameters. The ``compared`` block compares them with
            the same number of parameters chosen in hindsight.

    Returns:
        The ``energy`` and ``heat_map`` of the calibration block.
    """
    sums = _EnergySums(targets, calibration, per_kind or {}, choices or {}, steps)

    def collect_tokens(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        sums.add(target, g_NO.float().T @ x_NI.float())

    with as_in_training(model, train) as scale, temporary_seed(seed):
        hooks = gradients_only(model, targets, sums.add, scale=scale)
        if quantized_layers(model):  # Quantized weights have no gradient.
            hooks = tokens_only(model, targets, collect_tokens, scale=scale)
        with hooks:
            for step in range(1, steps + 1):
                with meter() if step <= 2 else nullcontext():
                    loss = gradient_step(model, next(batches), step, scale=scale)
                on_step(step, loss)
    return sums.energy(), sums.heat_map()


class _EnergySums:
    """Energy shares of gradients in several bases, averaged over steps.

    Args:
        targets: the target modules; the heat map shows the middle one.
        calibration: the calibrated bases.
        per_kind: bases of whole kinds.
        choices: target name -> its trained parameters.
        steps: number of gradients per target.
    """

    def __init__(
        self,
        targets: list[Target],
        calibration: Calibration,
        per_kind: Mapping[str, Basis],
        choices: Mapping[str, Choice],
        steps: int,
    ) -> None:
        self._targets, self._per_kind, self._choices = targets, per_kind, choices
        self._per_target, self._steps = calibration.by_target(), steps
        by_layer = any(calibration.keys[t.name] != t.kind for t in targets)
        self._own = "layer_basis" if by_layer else "kind_basis"
        self._shares: dict[str, dict[str, float]] = {t.name: defaultdict(float) for t in targets}
        self._compared: dict[str, dict[str, float]] = {n: defaultdict(float) for n in choices}
        self._shown = targets[len(targets) // 2].name
        self._maps: dict[str, Tensor] = {}

    def add(self, target: Target, grad_OI: Tensor) -> None:
        """Add the gradient of one step."""
        grad, own, name = grad_OI.float(), self._per_target[target.name], target.name
        bases = {self._own: own}
        if target.kind in self._per_kind:
            bases.setdefault("kind_basis", self._per_kind[target.kind])
        if own.q_in.shape[0] == own.q_in.shape[1]:
            bases["transposed"] = replace(own, q_in=own.q_in.T)
        cores = {column: to_core(grad, basis) for column, basis in bases.items()}
        cores["original"] = grad
        for column, core in cores.items():
            self._shares[name][column] += energy_share(core, TOP, whole=grad) / self._steps
        core = cores[self._own]
        if core.numel() < grad.numel():
            self._shares[name]["whole_core"] += energy_share(core, 1.0, whole=grad) / self._steps
        if name in self._choices:
            for column, share in self._choices[name].energies(grad).items():
                self._compared[name][column] += share / self._steps
        if name == self._shown:
            for column, matrix in (("original", grad), ("basis", core)):
                pooled = _pool(matrix.abs())
                before = self._maps.get(column)
                self._maps[column] = pooled if before is None else before + pooled

    def energy(self) -> EnergyBlock:
        """Return the ``energy`` block."""
        rows = [{"target": t.name, "kind": t.kind, **self._shares[t.name]} for t in self._targets]
        energy: dict[str, Any] = {"top": TOP, "steps": self._steps, "rows": rows}
        energy["mean_by_kind"] = _mean_by_kind(rows)
        if self._choices:
            compared = [
                {
                    "target": t.name,
                    "kind": t.kind,
                    "count": self._choices[t.name].count,
                    **self._compared[t.name],
                }
                for t in self._targets
                if t.name in self._choices
            ]
            means = _mean_by_kind(compared)
            verdict = verdict_of(means)
            energy["compared"] = {"rows": compared, "mean_by_kind": means, "verdict": verdict}
        return EnergyBlock.model_validate(energy)

    def heat_map(self) -> HeatMap:
        """Return the mean absolute gradient of the middle target, without and with its basis."""
        original, basis = (
            (self._maps[column] / self._steps).tolist() for column in ("original", "basis")
        )
        return HeatMap(target=self._shown, original=original, basis=basis)


def verdict_of(means: Mapping[str, Mapping[str, float]]) -> str:
    """Compare the energy in the support with the best choice in hindsight, in one sentence."""

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
    """Return the means of a matrix over at most 96 x 96 cells, on the CPU."""
    rows, columns = (min(side, _HEAT_MAP_SIDE) for side in matrix.shape)
    pooled = F.adaptive_avg_pool2d(matrix[None, None], (rows, columns))[0, 0]
    return pooled.to("cpu", torch.float32)


def spectra(bases: dict[str, Basis]) -> list[Spectrum]:
    """Return singular values divided by the largest, in descending order, at most 256 per side."""
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
