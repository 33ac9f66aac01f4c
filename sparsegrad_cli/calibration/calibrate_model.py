"""Calibrate any torch model on any batches: the part of calibration that Python users call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import ValidationError
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import BasisFile, basis_digest
from sparsegrad_cli.calibration.calibrate import calibrate as calibrate_targets
from sparsegrad_cli.calibration.calibrate import passes_of
from sparsegrad_cli.calibration.warmup import WARMUP_BATCHES, warmed_head
from sparsegrad_cli.models.digests import fingerprint
from sparsegrad_cli.models.quantized import record_dtype
from sparsegrad_cli.models.targets import Target, find_targets, is_linear, linear_shape
from sparsegrad_cli.numerics.sizing import count_for_density, rank_for_counts
from sparsegrad_cli.recipe.problems import explain
from sparsegrad_cli.recipe.schema import CalibrationSection, TargetsSection
from sparsegrad_cli.records.basis import BasisMetadata
from sparsegrad_cli.records.run import CalibrationSettings

Loss = Callable[[Any, Any], Tensor]


class _Output:
    """An output with ``loss``, as the models of transformers return it."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class _WithLoss(nn.Module):
    """A plain torch model, called with a batch of ``inputs`` and ``labels``."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Any, labels: Any) -> _Output:
        """Return the loss of the model's output."""
        return _Output(self.loss(self.model(inputs), labels))


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | Iterable[tuple[Any, Any]],
    *,
    loss: Loss | None = None,
    target_modules: Sequence[str] | str | None = None,
    steps: int = 12,
    rank: int | None = None,
    density: float | None = None,
    basis_per: Literal["layer", "kind"] = "layer",
    source: Literal["batch", "token", "token_gradient"] = "token",
    score: Literal["spectral", "mean", "gradient", "square", "token_square"] = "spectral",
    warmup_steps: int = 50,
    seed: int = 0,
) -> BasisFile:
    """Compute the bases in which a model's gradients are sparse (Chekalina et al. 2024, section 3).

    The model is not changed: weights, gradients, mode and random state are restored. Forward and
    backward passes run in training mode, on the device that holds the model.

    Args:
        model: Any torch model. Without ``loss``, it must return an object with ``loss``, as the
            models of transformers do when a batch has ``labels``.
        batches: Mappings of the arguments of ``model.forward``, or, with ``loss``, pairs of
            (inputs, targets). The first ``steps`` of them are used and kept in memory; if there are
            fewer, all are used.
        loss: Function of the model's output and the targets, such as
            ``torch.nn.functional.cross_entropy``; it returns a mean over the rows of the batch.
        target_modules: Names, suffixes of names or a regular expression, as in PEFT; by default
            the linear layers of the MLPs of a transformer.
        steps: Largest number of batches for the bases.
        rank: Directions per side to keep; by default what a sparse core of ``density`` needs. A
            side with fewer features keeps all its directions.
        density: Share of the parameters that will train, which chooses the rank; 0.01 by default.
        basis_per: ``layer``: one basis per module; ``kind``: modules at the same place of their
            blocks share one, which saves memory.
        source: ``token``: from g and x of every token; ``token_gradient``: from the gradients of
            single tokens; ``batch``: from the gradients of batches, as the paper does.
        score: How the parameters of a static support are scored; ``spectral`` needs no second pass.
        warmup_steps: Steps that train the new head of a transformers classifier before the bases
            are computed, undone afterwards. A random head gives random gradients.
        seed: Seed of dropout and of the head's warm-up.

    Returns:
        The bases, for :class:`sparsegrad_cli.peft.SparseGradConfig`; ``save`` writes them to a
        file.

    Raises:
        UsageError: No target module was found.
        ValueError: There are no batches, a batch is neither a mapping nor a pair, the model
            returns no loss, or an argument is out of range, such as a rank above the widest side
            of all target modules.
        SparsegradError: A loss or a gradient is NaN or infinite.
    """
    _check_types(model, batches, loss)
    settings = _settings(
        steps=steps,
        basis_per=basis_per,
        source=source,
        decomposition="randomized",
        score=score,
        warmup_steps=0 if loss is not None else warmup_steps,
    )
    targets = _targets(model, target_modules)
    rank = _checked_rank(targets, rank, density)
    record_dtype(model)
    device = next(model.parameters()).device
    given = [_moved(batch, device) for batch in islice(batches, steps)]
    return _calibrate(model, given, loss, targets, rank, settings, seed)


def _check_types(model: Any, batches: Any, loss: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"calibrate: model is of type {type(model).__name__}: expected a torch.nn.Module as "
            "the first argument and the batches as the second"
        )
    single = isinstance(batches, str | bytes | Mapping | Tensor | nn.Module)
    if single or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise ValueError(
            f"calibrate: batches is of type {type(batches).__name__}: expected an iterable of "
            "batches, such as a DataLoader or a list"
        )
    if loss is not None and not callable(loss):
        raise ValueError(
            f"calibrate: loss is of type {type(loss).__name__}: expected a function of the model's "
            "output and the targets"
        )


def _settings(**given: Any) -> CalibrationSection:
    try:
        return CalibrationSection(**given)
    except ValidationError as error:
        path, what, _ = explain(dict(error.errors()[0]), CalibrationSection)
        raise ValueError(f"calibrate: {path[0] if path else 'settings'}: {what}") from None


def _checked_rank(targets: Sequence[Target], rank: Any, density: Any) -> int:
    """Return ``rank``, or the one that a sparse core of ``density`` needs."""
    if density is not None and rank is not None:
        raise ValueError("calibrate: density only chooses the rank: give one of the two")
    density = 0.01 if density is None else density
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(
            f"calibrate: density is {density!r}: expected a number above 0 and up to 1"
        )
    if rank is None:
        return _rank_for(targets, density)
    widest = max(max(t.out_features, t.in_features) for t in targets)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= widest:
        raise ValueError(
            f"calibrate: rank is {rank!r}: expected a whole number from 1 to {widest}, the widest "
            "side of the target modules"
        )
    return rank


def _calibrate(
    model: nn.Module,
    given: Sequence[Any],
    loss: Loss | None,
    targets: list[Target],
    rank: int,
    settings: CalibrationSection,
    seed: int,
) -> BasisFile:
    if not given:
        raise ValueError("calibrate got no batches")
    if not torch.is_grad_enabled():
        raise ValueError(
            "calibrate computes gradients: call it outside torch.no_grad() and inference_mode()"
        )
    plain = loss is not None
    whole: nn.Module = model if loss is None else _WithLoss(model, loss)
    named = [_as_mapping(batch, plain) for batch in given]
    settings = settings.model_copy(update={"steps": len(named)})
    inner = [replace(t, name=f"model.{t.name}") for t in targets] if plain else targets
    training = model.training
    rate = settings.warmup_learning_rate
    head = named[:WARMUP_BATCHES]
    with warmed_head(
        whole, lambda: head, steps=settings.warmup_steps, learning_rate=rate, seed=seed
    ):
        found = calibrate_targets(whole, inner, lambda: iter(named), settings, seed=seed, rank=rank)
    model.train(training)
    bases = {_outer(key, plain): basis for key, basis in found.bases.items()}
    scores = {_outer(name, plain): score for name, score in found.scores.items()}
    metadata = BasisMetadata(
        model=getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
        fingerprint=fingerprint(model, targets),
        targets={_outer(name, plain): _outer(key, plain) for name, key in found.keys.items()},
        settings=CalibrationSettings(
            steps=settings.steps,
            basis_per=settings.basis_per,
            source=settings.source,
            decomposition=settings.decomposition,
            score=settings.score,
            warmup_steps=settings.warmup_steps,
            passes=passes_of(settings),
            seed=seed,
        ),
        recipe_digest="",
        digest=basis_digest(bases, scores),
    )
    return BasisFile(bases, metadata, scores)


def _outer(name: str, plain: bool) -> str:
    return name.removeprefix("model.") if plain else name


def _targets(model: nn.Module, modules: Sequence[str] | str | None) -> list[Target]:
    if modules is None:
        return find_targets(model, TargetsSection(), "target_modules")
    from peft import PeftConfig

    from sparsegrad_cli.errors import UsageError

    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise UsageError(
                f"{modules!r} is not a regular expression: {error}",
                where="target_modules",
                fix="correct it, or give a list of names",
            ) from None
    config: Any = PeftConfig()
    config.target_modules = modules if isinstance(modules, str) else set(modules)
    config.exclude_modules, config.layers_to_transform, config.layers_pattern = None, None, None
    found = [
        Target(name, name.rpartition(".")[2], 0, *linear_shape(m), not isinstance(m, nn.Linear))
        for name, m in model.named_modules()
        if is_linear(m) and check_target_module_exists(config, name)
    ]
    if not found:
        linear = [name for name, m in model.named_modules() if is_linear(m)]
        raise UsageError(
            f"{modules!r} matches no linear layer",
            where="target_modules",
            fix=f"the linear layers are {', '.join(linear[:20])}",
        )
    return found


def _rank_for(targets: Sequence[Target], density: float) -> int:
    counts = [count_for_density(density, t.out_features, t.in_features) for t in targets]
    widest = max(max(t.out_features, t.in_features) for t in targets)
    return min(widest, rank_for_counts(counts, dense=False))


def _as_mapping(batch: Any, plain: bool) -> dict[str, Any]:
    if plain and isinstance(batch, tuple | list) and len(batch) == 2:
        return {"inputs": batch[0], "labels": batch[1]}
    if not plain and isinstance(batch, Mapping):
        return dict(batch)
    wanted = "a pair (inputs, targets)" if plain else "a mapping of the arguments of model.forward"
    hint = "" if plain else "; for pairs, pass loss="
    raise ValueError(f"expected {wanted} as a batch, got {type(batch).__name__}{hint}")


def _moved(value: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value
