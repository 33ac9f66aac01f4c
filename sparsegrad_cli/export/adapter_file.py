"""Read and write adapter.json, which describes the run and base model of an adapter.

The model checks every value, because the file may come from anyone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.methods.registry import MethodSection
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.recipe.section import NonNegativeInt, PositiveInt, Section, Seed

FORMAT: Literal["sparsegrad-adapter-1"] = "sparsegrad-adapter-1"
TENSORS, SETTINGS = "adapter.safetensors", "adapter.json"


class AdapterTarget(Section):
    """A :class:`sparsegrad_cli.models.targets.Target`."""

    name: str = Field(min_length=1)
    kind: str
    block: NonNegativeInt
    out_features: PositiveInt
    in_features: PositiveInt
    transposed: bool

    def target(self) -> Target:
        """Return the target module."""
        return Target(**self.model_dump())


class AdapterBase(Section):
    """The base model, and the settings that the task added to its configuration."""

    name: str = Field(min_length=1)
    revision: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: Literal["8bit", "4bit"] | None = None
    auto_class: Literal["AutoModelForSequenceClassification", "AutoModelForCausalLM"]
    fingerprint: str
    num_labels: PositiveInt
    id2label: dict[str, str]
    problem_type: str | None
    pad_token_id: NonNegativeInt | None


class AdapterSettings(Section):
    """The content of adapter.json."""

    format: Literal["sparsegrad-adapter-1"]
    model: AdapterBase
    method: MethodSection
    scope: Literal["head", "rest"]
    seed: Seed
    targets: tuple[AdapterTarget, ...] = Field(min_length=1)
    keys: dict[str, str] = Field(description="target name -> key of its basis")
    digest: str = Field(description="sha256 of the tensors")


def write_settings(folder: Path, settings: AdapterSettings) -> None:
    """Write adapter.json.

    Raises:
        DiskError: It cannot be written.
    """
    write_text_atomic(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")


def read_settings(folder: Path) -> AdapterSettings:
    """Read and check adapter.json.

    Raises:
        FileFormatError: It is missing, not JSON, of another version, or has a wrong value.
    """
    path = folder / SETTINGS
    fix = "export the run again with `sparsegrad export RUN --to adapter`"
    try:
        return AdapterSettings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FileFormatError(
            f"cannot read the adapter: {error.strerror or error}", where=str(path), fix=fix
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise FileFormatError(
            f"is not an adapter.json of this version: {key}: {first['msg']}",
            where=str(path),
            fix=fix,
        ) from error


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of names, shapes, dtypes and bytes, in the order of the names."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16.
    return sha.hexdigest()
