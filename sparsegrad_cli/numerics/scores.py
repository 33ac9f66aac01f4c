"""Scores of the entries of a core, from gradients seen in its basis.

A core gradient is C = Q_out' G Q_in = (g Q_out)' (x Q_in); with h = g Q_out (N, r_out) and
u = x Q_in (N, r_in) it is a sum over tokens of h_n' u_n. Three scores, each a mean over steps:

``gradient``      |C|                    the criterion of a single step
``square``        C^2                    the diagonal of the empirical Fisher, by batch
``token_square``  (h^2)' (u^2)           the same by token: no two tokens cancel
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis


class ScoreStream:
    """The mean score of each entry of one target's core; memory does not grow with the stream.

    Args:
        basis: truncated to the core's rank.
        score: ``gradient``, ``square`` or ``token_square``.
    """

    def __init__(self, basis: Basis, score: str) -> None:
        if score not in ("gradient", "square", "token_square"):
            raise ValueError(f"unknown score {score!r}")
        self.basis, self.score = basis, score
        self.total = basis.q_out.new_zeros(basis.q_out.shape[1], basis.q_in.shape[1])
        self._step = torch.zeros_like(self.total)
        self.count = self.total.new_zeros(())

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor) -> None:
        """Add tokens of the current step: dL/dy (N, out) and x (N, in), any floating dtype."""
        h_NR = g_NO.to(self.total.dtype) @ self.basis.q_out  # (N, out) @ (out, r_out)
        u_NS = x_NI.to(self.total.dtype) @ self.basis.q_in  # (N, in) @ (in, r_in)
        if self.score == "token_square":
            h_NR, u_NS = h_NR.square_(), u_NS.square_()
        self._step.addmm_(h_NR.T, u_NS)  # (r_out, N) @ (N, r_in)

    def end_step(self) -> None:
        """End a step: a layer that is used more than once has one gradient."""
        step = self._step.square_() if self.score == "square" else self._step.abs_()
        self.total += step
        self._step.zero_()
        self.count += 1

    def mean(self) -> Tensor:
        """Return the mean over the steps, (r_out, r_in)."""
        return self.total / self.count.clamp_min(1)

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.total, self.count]
