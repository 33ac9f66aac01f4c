"""Define the base of every recipe section and the types that sections share. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.yaml_source import KeyPath

LARGEST = 2**31 - 1  # the largest 32-bit integer, for code in C
Density = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range of numpy's seeds
_SIZE = r"[0-9]{1,12}(\.[0-9]{1,9})? ?[KMG]iB"
Bytes = Annotated[str, Field(pattern=f"^{_SIZE}$")]
# Values of calibration.source: those that sum over tokens, and those that read data at all.
OVER_TOKENS = ("token", "token_gradient")
FROM_GRADIENTS = ("batch", *OVER_TOKENS)


def parse_bytes(text: str) -> int:
    """Return the bytes of a size: ``64MiB`` is 67108864.

    Raises:
        ValueError: The text is not a size.
    """
    if not re.fullmatch(_SIZE, text):
        raise ValueError(f"{text!r} is not a size")
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return int(float(text[:-3]) * units[text[-3:]])


class SettingError(ValueError):
    """An error of a section's validator that names keys and what to write instead.

    Args:
        what: What is wrong, to continue a sentence about the first key.
        keys: The dotted keys within the section that are involved; the wrong one comes first.
        fix: What to write instead.
    """

    def __init__(self, what: str, *keys: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.keys, self.fix = keys, fix


class Section(BaseModel):
    """The base of every section.

    Sections are immutable. They refuse unknown keys, strings in place of numbers, Inf and NaN.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Idle:
    """A setting without effect.

    Attributes:
        key: Its path.
        causes: Paths of the settings that disable it; a stronger one overrules it.
        why: The reason, to continue a sentence about the key.
        fix: What to write instead.
        neutral: The value for the resolved recipe.
        common: Whether several commands share the key, such as those for several methods. On a
            command line such a key is reported in a note, not refused.
    """

    key: KeyPath
    causes: tuple[KeyPath, ...]
    why: str
    fix: str
    neutral: Any
    common: bool = False
