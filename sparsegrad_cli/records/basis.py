"""The metadata of basis.safetensors. Safetensors stores metadata as texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Self

from pydantic import Field, ValidationError

from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.records.base import Block, problems
from sparsegrad_cli.records.run import CalibrationSettings

FORMAT = "sparsegrad-basis-1"


class BasisMetadata(Block):
    """The model of a basis, and how the basis was computed."""

    format: str = Field(FORMAT, description=f"`{FORMAT}`.")
    model: str = Field(description="The base model's name.")
    fingerprint: str = Field(description="sha256 (hex) of the target modules.")
    targets: dict[str, str] = Field(
        description="By target module: the key of its basis. It is the target's name, or a layer "
        "kind if targets share a basis."
    )
    settings: CalibrationSettings
    recipe_digest: str = Field(description="Digest of the recipe of the basis.")
    digest: str = Field(description="sha256 (hex) of the tensors.")
    check: str = Field("", description="sha256 (hex) of all other metadata.")

    def to_texts(self) -> dict[str, str]:
        """Return the metadata as texts, with their check."""
        plain = {**self.to_json(), "format": self.format}
        plain.pop("check", None)
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in plain.items()}
        return texts | {"check": _check(texts)}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Self:
        """Read the metadata of a file.

        Raises:
            ValueError: The metadata was changed, or a value is missing or damaged.
        """
        if texts.get("check") != _check({k: v for k, v in texts.items() if k != "check"}):
            raise ValueError("its metadata was changed")
        plain: dict[str, object] = dict(texts)
        for key in ("targets", "settings"):
            plain[key] = plain_json(texts.get(key, "null"))
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise ValueError(problems(error)) from error


def _check(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode()).hexdigest()
