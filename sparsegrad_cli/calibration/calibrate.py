"""Compute bases and support scores from gradients, without updating the model.

Weights, gradients, requires_grad, training mode and random state are restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli import distributed
from sparsegrad_cli.calibration.gradients import (
    Batch,
    as_in_training,
    gradient_step,
    gradients_only,
    micro_batches,
    tokens_only,
)
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.interruption import raise_if_requested
from sparsegrad_cli.models.targets import Target, basis_keys
from sparsegrad_cli.numerics.hosvd import (
    Basis,
    GramStream,
    SequentialStream,
    Stream,
    leading,
    truncated,
)
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.numerics.sketch import SketchStream
from sparsegrad_cli.numerics.supports import ScoreStream
from sparsegrad_cli.recipe.schema import CalibrationSection, TrainSection
from sparsegrad_cli.recipe.section import FROM_GRADIENTS, OVER_TOKENS

Batches = Callable[[], Iterator[Batch]]
Meter = Callable[[], AbstractContextManager[Any]]
OnStep = Callable[[int, float], None]
OnStream = Callable[[str, Stream], None]
# Over tokens, the inputs of all targets are kept until their gradients arrive, which a
# training step need not do. Each batch is therefore split in two, so that calibration needs less
# memory than training. The sums run over the same tokens.
_PARTS = 2


@dataclass
class Calibration:
    """The result of calibration.

    Attributes:
        bases: key (target name or layer kind) -> basis, cut to the method's rank, with all its
            singular values.
        keys: target name -> key.
        scores: target name -> scores of the core's parameters, (r_out, r_in); empty if the support
            is chosen by the singular values alone.
        seconds: wall time of gradients and eigenvectors.
        stream_bytes: bytes of all sums: the memory that calibration itself adds to the peak.
        losses: one loss per step, pass after pass.
    """

    bases: dict[str, Basis]
    keys: dict[str, str]
    scores: dict[str, Tensor]
    seconds: float
    stream_bytes: int
    losses: list[float] = field(default_factory=list)

    def by_target(self) -> dict[str, Basis]:
        """Return target name -> basis; targets with the same key share the object."""
        return {name: self.bases[key] for name, key in self.keys.items()}


@dataclass
class _Passes:
    """Several passes over the same batches with the same dropout."""

    model: nn.Module
    batches: Batches
    steps: int
    seed: int
    meter: Meter
    on_step: OnStep
    scale: float
    losses: list[float] = field(default_factory=list)

    def run(
        self,
        hooks: AbstractContextManager[None],
        after: Callable[[], None] = lambda: None,
        *,
        parts: int = 1,
    ) -> None:
        """Run one pass with each batch split into ``parts``; call ``after`` after each step."""
        batches = self.batches()
        with hooks, temporary_seed(self.seed):
            for step in range(1, self.steps + 1):
                with self.meter() if step <= 2 else nullcontext():
                    cut = micro_batches(next(batches), parts)
                    losses = (
                        gradient_step(self.model, part, step, share=share, scale=self.scale)
                        for part, share in cut
                    )
                    self.losses.append(sum(losses))
                    after()
                self.on_step(len(self.losses), self.losses[-1])


def passes_of(settings: CalibrationSection) -> int:
    """Return the number of passes over the batches."""
    count = int(settings.score != "spectral")
    if settings.source in FROM_GRADIENTS:
        count += {"exact": 1, "sequential": 2, "randomized": 1 + settings.power_steps}[
            settings.decomposition
        ]
    return count


def calibrate(
    model: nn.Module,
    targets: list[Target],
    batches: Batches,
    settings: CalibrationSection,
    *,
    seed: int,
    rank: int | float | None = None,
    train: TrainSection | None = None,
    whole: bool = False,
    meter: Meter = nullcontext,
    on_step: OnStep = lambda step, loss: None,
    on_stream: OnStream = lambda key, stream: None,
) -> Calibration:
    """Compute bases from batches, and support scores if the settings ask for them.

    Args:
        model: any model whose output has ``loss``; it is restored.
        targets: the target modules.
        batches: returns an iterator over at least ``settings.steps`` batches on the model's device.
            It is called once per pass, with the same batches. Each process has its own batches.
        settings: the source, the decomposition and the score of the calibration.
        seed: seed of dropout and test matrices; the global random state is restored.
        rank: rank that the method keeps (:func:`truncated`), for decompositions that need it.
        train: settings of gradient checkpointing and autocast; None for neither.
        whole: keep all directions of the bases, whatever ``rank`` the method keeps.
        meter: context in which the first two steps of a pass and the eigenvectors are measured.
        on_step: called after each step with its number, from 1 over all passes, and its loss.
        on_stream: called with each key and its sums once its basis is made. The sums are freed
            afterwards unless the function keeps them.

    Raises:
        SparsegradError: a loss or gradient is not finite.
    """
    keys = basis_keys(targets, settings.basis_per)
    started = time.perf_counter()
    device, held = next(model.parameters()).device, 0
    sides = {keys[t.name]: (t.out_features, t.in_features) for t in targets}
    kept = None if whole else rank
    seeded = {key: (*side, seed + number) for number, (key, side) in enumerate(sides.items())}
    with as_in_training(model, train) as scale:
        passes = _Passes(model, batches, settings.steps, seed, meter, on_step, scale)
        if settings.source in FROM_GRADIENTS:
            streams = {key: _stream(settings, *args, rank, device) for key, args in seeded.items()}
            _fill(passes, targets, keys, streams, settings.source)
            held = sum(stream.nbytes() for stream in streams.values())
            bases = _bases(streams, kept, meter, on_stream)
        else:
            bases = {
                key: leading(_given_basis(settings.source, *args, device), kept)
                for key, args in seeded.items()
            }
        # Other libraries or devices may decompose the same sums differently.
        for b in bases.values():
            distributed.broadcast((b.q_out, b.q_in, b.singular_out, b.singular_in))
        scores = {}
        if settings.score != "spectral":
            scores = _scores(passes, targets, keys, bases, settings, rank if whole else None)
    seconds = time.perf_counter() - started
    return Calibration(bases, keys, scores, seconds, held, passes.losses)


def _bases(
    streams: dict[str, Stream], rank: int | float | None, meter: Meter, on_stream: OnStream
) -> dict[str, Basis]:
    """Return key -> basis of a stream, and remove the streams.

    Each stream is freed once its basis is cut. The Grams and full-rank bases of all targets
    together need much more memory than the sums alone.
    """
    bases = {}
    with meter():
        for key in list(streams):
            stream = streams.pop(key)
            with _finite(key):
                bases[key] = leading(stream.basis(), rank)
            on_stream(key, stream)
            del stream
    return bases


def _stream(
    settings: CalibrationSection,
    out_features: int,
    in_features: int,
    seed: int,
    rank: int | float | None,
    device: torch.device,
) -> Stream:
    shape = out_features, in_features
    if settings.decomposition == "sequential":
        return SequentialStream(*shape, rank=rank, device=device)
    if settings.decomposition == "randomized":
        assert isinstance(rank, int)  # The recipe was checked.
        return SketchStream(
            *shape, rank=rank, power_steps=settings.power_steps, seed=seed, device=device
        )
    return GramStream(*shape, device=device)


def _fill(
    passes: _Passes,
    targets: list[Target],
    keys: dict[str, str],
    streams: dict[str, Stream],
    source: str,
) -> None:
    def collect(target: Target, grad_OI: Tensor) -> None:
        streams[keys[target.name]].add(grad_OI)

    def collect_tokens(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        weighted = source == "token_gradient"
        streams[keys[target.name]].add_tokens(g_NO, x_NI, weighted=weighted)

    for number in range(next(iter(streams.values())).passes):
        if number:
            for key, stream in streams.items():
                with _finite(key):
                    stream.next_pass()
        if source == "batch":
            passes.run(gradients_only(passes.model, targets, collect, scale=passes.scale))
        else:
            hooks = tokens_only(passes.model, targets, collect_tokens, scale=passes.scale)
            passes.run(hooks, parts=_PARTS)
        distributed.all_reduce(total for stream in streams.values() for total in stream.sums())


def _scores(
    passes: _Passes,
    targets: list[Target],
    keys: dict[str, str],
    bases: dict[str, Basis],
    settings: CalibrationSection,
    rank: int | float | None,
) -> dict[str, Tensor]:
    """Score the cores' parameters from tokens in one more pass that forms no weight gradients.

    Args:
        rank: rank to which the bases are truncated first; None if they are already.
    """
    bases = {key: truncated(basis, rank) for key, basis in bases.items()}
    streams = {t.name: ScoreStream(bases[keys[t.name]], settings.score) for t in targets}
    # As many parts as in the other passes, so that the dropout is the same.
    parts = _PARTS if settings.source in OVER_TOKENS else 1

    def collect(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        streams[target.name].add_tokens(g_NO, x_NI)

    def after() -> None:
        for stream in streams.values():
            stream.end_step()

    hooks = tokens_only(passes.model, targets, collect, scale=passes.scale)
    passes.run(hooks, after, parts=parts)
    distributed.all_reduce(total for stream in streams.values() for total in stream.sums())
    return {name: stream.mean() for name, stream in streams.items()}


def _given_basis(
    source: str, out_features: int, in_features: int, seed: int, device: torch.device
) -> Basis:
    """Return a basis that does not depend on the data, for comparison: random or the identity."""
    shape, sides = (out_features, in_features), []
    generator = torch.Generator().manual_seed(seed)
    for side in shape:
        square = torch.eye(side)
        if source == "random":
            square = torch.linalg.qr(torch.randn(side, side, generator=generator)).Q
        sides.append(square.to(device))
    return Basis(sides[0], sides[1], *(torch.ones(side, device=device) for side in shape))


@contextmanager
def _finite(key: str) -> Iterator[None]:
    """Raise SparsegradError if the basis inside cannot be computed; stop first if requested."""
    raise_if_requested(f"the basis of {key}")
    try:
        yield
    except ValueError as error:
        raise SparsegradError(
            f"calibration of {key} found no basis: {error}",
            where="calibration",
            fix="use model.dtype: float32, or look at the data of these steps",
        ) from error
