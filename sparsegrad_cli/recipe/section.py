"""What every section of a recipe is, and the types they share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.yaml_source import KeyPath

LARGEST = 2**31 - 1  # a number of anything; what counts in C holds it
Density = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
Bytes = Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})? ?[KMG]iB$")]


def parse_bytes(text: str) -> int:
    """``64MiB`` -> 67108864."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return int(float(text[:-3]) * units[text[-3:]])


class SettingError(ValueError):
    """What a validator of a section refuses, where the message alone does not say it all.

    Args:
        what: what is wrong, as the rest of a sentence about the first key.
        keys: dotted keys within the section that are involved, the one to blame first.
        fix: what to write instead.
    """

    def __init__(self, what: str, *keys: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.keys, self.fix = keys, fix


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent casts of strings to numbers, no
    infinity and no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Idle:
    """A setting without effect.

    Attributes:
        key: its path.
        causes: paths of the settings that disable it; one that is stronger overrules it.
        why: the reason, as the rest of a sentence about the key.
        fix: what to write instead.
        neutral: the value that says the same in a resolved recipe.
        common: several commands share the key, of several methods or the one that made the basis:
            on a command line it is noted, not refused.
    """

    key: KeyPath
    causes: tuple[KeyPath, ...]
    why: str
    fix: str
    neutral: Any
    common: bool = False
