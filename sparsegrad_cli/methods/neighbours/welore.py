"""WeLoRe: W becomes B A in the modules whose singular values fall fast, and only those train.

Jaiswal et al. 2024, "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights:
Observations, Theories, and Applications", arXiv 2407.11239, sections WeLore-COMP and WeLore-PEFT.
The singular values of each W are divided by the largest. One threshold k for all modules is the
first of 0, 0.005, 0.01, ... below which lies the wanted share of all of them. With r the number of
values of W that are at least k, a module is a low-rank component if r < rank(W) / 2. Those are
replaced by B A of rank r, which trains; the others stay whole and frozen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.methods.neighbours.factor_settings import WeloreSettings
from sparsegrad_cli.methods.neighbours.low_rank import LowRankMethod, wide_OI
from sparsegrad_cli.models.targets import Target

_STEPS = 200  # of the search for the threshold, from 0 to 1
_LOW_RANK = 0.5  # share of the full rank below which a module counts as a low-rank component


class Welore(LowRankMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: WeloreSettings

    def ranks(self, model: nn.Module, targets: list[Target]) -> Mapping[str, int]:
        """Return the ranks of the low-rank components, or of all targets if they are uniform."""
        if self.settings.allocation == "uniform":
            rank = self.settings.uniform_rank
            return {t.name: rank(t.out_features, t.in_features) for t in targets}
        spectra = {t.name: torch.linalg.svdvals(wide_OI(model, t)) for t in targets}
        ranks = ranks_by_threshold(spectra, self.settings.reduction)
        low = {n: r for n, r in ranks.items() if r < _LOW_RANK * len(spectra[n])}
        if not low:
            raise SparsegradError(
                f"expected modules of low rank, but at method.reduction {self.settings.reduction:g}"
                f" all {len(targets)} targets keep half of their rank or more",
                where="method.reduction",
                fix="a larger method.reduction, or method.allocation: uniform",
            )
        return low


def ranks_by_threshold(spectra: Mapping[str, Tensor], reduction: float) -> dict[str, int]:
    """Return name -> number of singular values at or above the common threshold, at least 1.

    Args:
        spectra: name -> (k,) singular values, the largest first.
        reduction: share of all values that must lie below the threshold.
    """
    scaled = {name: (values / values[0]).cpu() for name, values in spectra.items()}
    together = torch.cat(list(scaled.values()))
    for step in range(_STEPS + 1):
        threshold = step / _STEPS
        if float((together < threshold).double().mean()) >= reduction:
            break
    return {name: max(1, int((values >= threshold).sum())) for name, values in scaled.items()}
