"""SVFit: the largest singular values of W train.

Sun et al. 2024, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular
Values", arXiv 2409.05926: W = U_r S_r V_r' + W_e, of which S_r trains. The parameters are the
differences d of the singular values to those of W, so that the layer starts as it was, bit for bit,
and weight decay pulls towards W: W + U_r diag(d) V_r'. U_r and V_r are computed again from W
wherever the adapter is loaded, in float64: a pair of singular vectors is unique up to a common
sign, which the product does not depend on.
"""

from __future__ import annotations

from sparsegrad_cli.methods.neighbours.change import ChangeMethod, DiagonalChange, Place
from sparsegrad_cli.methods.neighbours.change_settings import SvfitSettings
from sparsegrad_cli.numerics.lowrank import leading_singular_vectors


class Svfit(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SvfitSettings

    def make_change(self, place: Place) -> DiagonalChange:
        """Return a diagonal of zeros between the leading singular vectors."""
        u_OR, _, v_IR = leading_singular_vectors(place.read_weight().double(), place.narrow_rank)
        dtype = place.product_dtype
        return DiagonalChange(u_OR.to(dtype), v_IR.to(dtype), place.like)
