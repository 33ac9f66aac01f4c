"""Parse ``match``, by which a study makes its methods comparable. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.section import SettingError, parse_bytes
from sparsegrad_cli.recipe.yaml_source import shorten

Kind = Literal["trainable", "optimizer_state", "peak"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_EXAMPLES = {
    "trainable": "trainable=70k",
    "optimizer_state": "optimizer_state=64MiB",
    "peak": "peak=2GiB",
}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"
_THOUSANDS = {"": 1, "k": 1000, "M": 1_000_000}


@dataclass(frozen=True)
class Budget:
    """The limit that every method of a study must stay within.

    Attributes:
        kind: ``trainable`` parameters of the target modules at once, bytes of
            ``optimizer_state``, or bytes at the ``peak`` of training step and calibration.
        amount: the limit, a number of parameters or bytes.
        text: the budget as it was written, ``peak=2GiB``.
    """

    kind: Kind
    amount: float
    text: str

    @property
    def in_bytes(self) -> bool:
        """Whether the amount is a number of bytes."""
        return self.kind in ("optimizer_state", "peak")


NOTHING = ("none", "null")  # values of --match that leave methods unmatched


def parse_match(text: str) -> Budget | None:
    """Parse a budget such as ``peak=2GiB``.

    Returns:
        The budget; None for ``trainable`` alone, which uses the recipe's density.

    Raises:
        SettingError: the text is something else; the error says what to write.
    """
    if text == "trainable":
        return None
    name, sign, amount = text.partition("=")
    kind = next((known for known in KINDS if known == name), None)
    if name == "seconds":
        fix = f"use {_EXAMPLES['trainable']} or {_EXAMPLES['peak']}; the report shows run times"
        raise SettingError("seconds is no longer a budget, because times vary", fix=fix)
    if kind is None:
        fix = suggest(name, KINDS) if sign else f"such as {_EXAMPLES['peak']}, or trainable"
        raise SettingError(f"{shorten(text)} is not a budget", fix=fix)
    if not sign:
        raise SettingError(f"{shorten(text)} has no amount", fix=f"such as {_EXAMPLES[kind]}")
    return Budget(kind, _amount(kind, amount.strip(), text), text)


def _amount(kind: Kind, amount: str, text: str) -> float:
    try:
        found = _parameters(amount) if kind == "trainable" else parse_bytes(amount)
    except ValueError:
        unit = "a whole number of parameters" if kind == "trainable" else "a number of bytes"
        what = f"{shorten(text)}: expected {unit}, got {shorten(amount)}"
        raise SettingError(what, fix=_advice(kind, amount)) from None
    if found <= 0:
        raise SettingError(f"{shorten(text)} is not above 0", fix=f"such as {_EXAMPLES[kind]}")
    return float(found)


def _parameters(amount: str) -> int:
    """Return a number of parameters: ``70k`` is 70000; raise ValueError if it is not one."""
    parts = re.fullmatch(rf"({_NUMBER})([kM]?)", amount)
    exact = Decimal(parts[1]) * _THOUSANDS[parts[2]] if parts else None
    if exact is None or exact % 1:
        raise ValueError
    return int(exact)


def _advice(kind: Kind, amount: str) -> str:
    """Return what to write; for a size in other units, the nearest valid spelling."""
    near = re.fullmatch(rf"({_NUMBER}) ?([kKmMgG])[iI]?[bB]?", amount)
    if kind in ("optimizer_state", "peak") and near:
        return f"did you mean {kind}={near[1]}{near[2].upper()}iB? A GiB is 1024 MiB"
    return f"such as {_EXAMPLES[kind]}"
