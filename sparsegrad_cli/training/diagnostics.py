"""What a basis is worth, on gradients it never saw: energy shares, spectra, heat maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.modeling.quantized import quantized_layers
from sparsegrad_cli.modeling.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, GramStream, Stream
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.supports import energy_share
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.stopping import stop_here
from sparsegrad_cli.training.calibration import Calibration
from sparsegrad_cli.training.gradients import (
    Batch,
    as_in_training,
    forked_random,
    gradient_step,
    gradients_only,
    tokens_only,
)

TOP = 0.01
_HEAT_MAP_SIDE = 96
_SPECTRUM_LENGTH = 256


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
            stop_here(f"the basis of {kind}")
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
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean share of squared entries in the top 1 % of held-out gradients, per target.

    Columns: ``original`` (no basis), ``transposed`` (Q_out' G Q_in', the published code; needs a
    basis of full rank), ``kind_basis`` (needs Grams, or a basis per kind) and, when calibrated per
    layer, ``layer_basis``. The 1 % is of the target's entries, and the share is of all its energy,
    also where the basis is truncated; ``whole_core`` is then what all entries of the core hold.

    Args:
        per_kind: bases of whole kinds (:class:`KindGrams`), where those calibrated are per layer.
        train: gradient checkpointing and autocast as in training.
        meter: context in which the first two steps are measured.

    Returns:
        (``energy`` block, ``heat_map`` block) of run.json.
    """
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
        if target.name == shown:
            for name, core in (("original", grad), ("basis", to_core(grad, own))):
                pooled = _pool(core.abs())
                maps[name] = maps[name] + pooled if name in maps else pooled

    def collect_tokens(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        collect(target, g_NO.float().T @ x_NI.float())

    with as_in_training(model, train) as scale, forked_random(seed):
        hooks = gradients_only(model, targets, collect, scale=scale)
        if quantized_layers(model):  # whose weights have no gradient
            hooks = tokens_only(model, targets, collect_tokens, scale=scale)
        with hooks:
            for step in range(1, steps + 1):
                with meter() if step <= 2 else nullcontext():
                    gradient_step(model, next(batches), step, scale=scale)
    rows = [{"target": t.name, "kind": t.kind, **sums[t.name]} for t in targets]
    energy = {"top": TOP, "steps": steps, "rows": rows, "mean_by_kind": _mean_by_kind(rows)}
    heat_map: dict[str, Any] = {"target": shown}
    heat_map.update({name: (m / steps).tolist() for name, m in maps.items()})
    return energy, heat_map


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


def spectra(bases: dict[str, Basis]) -> list[dict[str, Any]]:
    """Singular values divided by the first, strongest first, at most 256 a side."""
    found = []
    for key, basis in bases.items():
        for side, values in (("out", basis.singular_out), ("in", basis.singular_in)):
            scaled = (values / values[0].clamp_min(1e-30))[:_SPECTRUM_LENGTH]
            found.append({"key": key, "side": side, "values": [float(v) for v in scaled]})
    return found
