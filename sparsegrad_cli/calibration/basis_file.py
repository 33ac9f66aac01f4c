"""Read, write and check basis.safetensors: bases, and the model and recipe they belong to.

A key is a target's name, or a layer kind if targets share a basis. The file holds these tensors:

- ``q_out/<key>`` (out, r) and ``q_in/<key>`` (in, r): the directions of each side.
- ``singular_out/<key>`` and ``singular_in/<key>``: at least r singular values each.
- ``tokens/<key>`` (): the weight of the live tokens (:class:`Basis`), if the basis was computed
  from tokens. Files of older versions lack it.
- ``score/<target>`` (r_out, r_in): scores of the core's parameters, if a second pass computed them.

The metadata is a :class:`sparsegrad_cli.records.basis.BasisMetadata`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import save_tensors
from sparsegrad_cli.models.digests import tensors_digest
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, by_columns, kept_columns
from sparsegrad_cli.records.basis import FORMAT, BasisMetadata

_PARTS = ("q_out", "q_in", "singular_out", "singular_in")
_SCORE, _TOKENS = "score/", "tokens/"
_LENGTH_ERROR = 0.02  # A direction may deviate this much from length one: bfloat16 rounds.


@dataclass(frozen=True)
class BasisFile:
    """The content of a basis file.

    Attributes:
        bases: key -> basis.
        metadata: each target's key, the model and recipe that the bases belong to, and the digest.
        scores: target name -> scores of its core's parameters; empty if the singular values serve
            as scores.
    """

    bases: Mapping[str, Basis]
    metadata: BasisMetadata
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        ranks = {basis.q_in.shape[1] for basis in self.bases.values()}
        ranks |= {basis.q_out.shape[1] for basis in self.bases.values()}
        span = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        return (
            f"<BasisFile of {self.metadata.model}: {len(self.bases)} bases of rank {span} for "
            f"{len(self.metadata.targets)} modules>"
        )

    def by_target(self) -> dict[str, Basis]:
        """Return target name -> basis; targets with the same key share the object."""
        return {name: self.bases[key] for name, key in self.metadata.targets.items()}

    def save(self, path: str | Path) -> None:
        """Write the bases to a safetensors file; see :func:`sparsegrad_cli.load_basis`.

        Raises:
            DiskError: The file cannot be written.
        """
        write_basis(Path(path), self)


def write_basis(path: Path, basis: BasisFile) -> None:
    """Write the file atomically.

    Raises:
        DiskError: the file cannot be written.
    """
    save_tensors(path, _tensors(basis.bases, basis.scores), basis.metadata.to_texts())


def read_basis(path: Path) -> BasisFile:
    """Read and verify a basis file.

    Raises:
        FileFormatError: the file is not a basis file, is damaged or truncated, or does not match
            its digest.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _unusable(path, f"the basis cannot be read: {error}") from error
    if texts.get("format") != FORMAT:
        raise _unusable(path, "is not a basis file of this version")
    try:
        metadata = BasisMetadata.from_texts(texts)
    except ValueError as error:
        raise _unusable(path, f"the basis file is damaged: {error}") from error
    try:
        bases = {key: _basis(tensors, key) for key in set(metadata.targets.values())}
        scores = {
            name.removeprefix(_SCORE): t for name, t in tensors.items() if name.startswith(_SCORE)
        }
        for name, score in scores.items():
            _check_score(name, score, bases[metadata.targets[name]])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _unusable(path, f"the basis file is incomplete: {error}") from error
    if basis_digest(bases, scores) != metadata.digest:
        raise _unusable(path, "the basis file is damaged: its digest does not fit")
    return BasisFile(bases, metadata, scores)


def _unusable(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), fix="make it again with `sparsegrad calibrate`")


def _basis(tensors: dict[str, Tensor], key: str) -> Basis:
    q_out, q_in, singular_out, singular_in = (tensors.pop(f"{part}/{key}") for part in _PARTS)
    check_directions(f"q_out/{key}", q_out, singular_out)
    check_directions(f"q_in/{key}", q_in, singular_in)
    tokens = tensors.pop(_TOKENS + key, None)
    if tokens is not None and not (tokens.shape == () and 0 < float(tokens) < math.inf):
        raise ValueError(f"{_TOKENS}{key} is not a number of tokens")
    return Basis(by_columns(q_out), by_columns(q_in), singular_out, singular_in, tokens)


def check_directions(name: str, q: Tensor, singular: Tensor) -> None:
    """Check the directions of one side of a layer: columns of length one with singular values.

    Args:
        name: name of the tensor, for the error.
        q: directions, (features, r).
        singular: their singular values, at least r.

    Raises:
        ValueError: a shape, dtype or value is wrong.
    """
    if not q.is_floating_point() or q.ndim != 2 or not 1 <= q.shape[1] <= q.shape[0]:
        raise ValueError(f"{name} of shape {tuple(q.shape)} holds no directions")
    lengths = torch.linalg.vector_norm(q.float(), dim=0)
    if not bool((lengths - 1).abs().max() < _LENGTH_ERROR):  # Also true for NaN.
        raise ValueError(f"{name} has columns that are not of length one")
    fits = singular.is_floating_point() and singular.ndim == 1 and len(singular) >= q.shape[1]
    if not fits or not bool(torch.isfinite(singular).all()):
        raise ValueError(f"the singular values of {name} do not fit it")


def _check_score(name: str, score: Tensor, basis: Basis) -> None:
    """Raise ValueError if the scores do not have the shape of the core, or are not finite."""
    shape = (basis.q_out.shape[1], basis.q_in.shape[1])
    fits = score.is_floating_point() and score.shape == shape
    if not fits or not bool(torch.isfinite(score).all()):
        raise ValueError(f"{_SCORE}{name} does not score a core of {shape[0]} x {shape[1]}")


def check_belongs(
    basis: BasisFile, targets: list[Target], fingerprint: str, where: str | None = None
) -> None:
    """Refuse a basis of another model or target set.

    Raises:
        UsageError: the target set, a layer's shape or the model's weights differ.
    """
    wanted, there = {t.name for t in targets}, set(basis.metadata.targets)
    fix = "leave calibration.basis out to make one, or run `sparsegrad calibrate` on this recipe"
    if wanted != there:
        missing, extra = sorted(wanted - there), sorted(there - wanted)
        parts = []
        if missing:
            parts.append(f"{len(missing)} targets have no basis in it (first: {missing[0]})")
        if extra:
            parts.append(f"it has {len(extra)} others (first: {extra[0]})")
        raise UsageError(
            "the basis belongs to another target set: " + "; ".join(parts), where=where, fix=fix
        )
    for target in targets:
        got = basis.bases[basis.metadata.targets[target.name]]
        shape = (got.q_out.shape[0], got.q_in.shape[0])
        if shape != (target.out_features, target.in_features):
            raise UsageError(
                f"the basis of {target.name} is for a {shape[0]} x {shape[1]} layer, "
                f"this one is {target.out_features} x {target.in_features}",
                where=where,
                fix=fix,
            )
    if basis.metadata.fingerprint != fingerprint:
        raise UsageError(
            f"the basis was made on other weights ({basis.metadata.model})", where=where, fix=fix
        )


def check_rank(basis: BasisFile, rank: int | float | None, where: str | None = None) -> None:
    """Refuse a basis with fewer directions than a method needs.

    Args:
        rank: number of directions needed per side (all of a side that has fewer), or the share of
            the energy that they must hold, or None for all directions.

    Raises:
        UsageError: there are too few directions, or too few singular values to compute a share.
    """
    for key, one in basis.bases.items():
        sides = (("output", one.q_out, one.singular_out), ("input", one.q_in, one.singular_in))
        for side, q, singular in sides:
            features = q.shape[0]
            if isinstance(rank, float):
                if len(singular) < features:
                    raise UsageError(
                        f"the basis of {key} has {len(singular)} of the {features} singular values "
                        f"of the {side} side: a rank of {rank:g} is a share of them all",
                        where=where,
                        fix="give method.rank in directions, or calibrate with exact decomposition",
                    )
                needed = kept_columns(singular, features, rank)
            else:
                needed = features if rank is None else min(rank, features)
            if q.shape[1] < needed:
                raise UsageError(
                    f"the basis of {key} holds {q.shape[1]} directions of the {side} side, "
                    f"{needed} are needed",
                    where=where,
                    fix="make it with this recipe's method, or ask for a smaller method.rank",
                )


def check_tokens(basis: BasisFile, where: str | None = None) -> None:
    """Refuse a basis from which a support over the whole model cannot be chosen.

    Raises:
        UsageError: the basis has neither scores nor the number of tokens behind its singular
            values.
    """
    unknown = [key for key, one in basis.bases.items() if one.token_weight is None]
    if unknown and not basis.scores:
        raise UsageError(
            "expected a basis that says how many tokens each target saw, without which targets "
            f"cannot be compared; {unknown[0]} does not say it (an older version made the file)",
            where=where,
            fix="make it again with `sparsegrad calibrate`, or use method.allocation: target",
        )


def basis_digest(bases: Mapping[str, Basis], scores: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of all tensors of the file."""
    return tensors_digest(sorted(_tensors(bases, scores).items()))


def _tensors(bases: Mapping[str, Basis], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {f"{part}/{key}": getattr(b, part) for key, b in bases.items() for part in _PARTS}
    parts |= {
        _TOKENS + key: b.token_weight for key, b in bases.items() if b.token_weight is not None
    }
    return parts | {_SCORE + name: score for name, score in scores.items()}
