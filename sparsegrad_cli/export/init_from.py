"""``init_from``: training starts from what another run, or a PEFT LoRA folder, has trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsegrad_cli.calibration.basis_file import BasisFile
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.export.restore import load_checked, read_basis_of
from sparsegrad_cli.export.run_files import RunFiles, open_run
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import expanded, is_file
from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.implementation import (
    Method,
    load_by_name,
    trainable_names,
    trainable_state,
)
from sparsegrad_cli.methods.peft_folder import CONFIG, TENSORS, from_peft
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.report.access import items
from sparsegrad_cli.tasks.setup import Setup
from sparsegrad_cli.training.adapter_folder import read_adapter

_FIX = "set the same in this recipe; or export that run with `--to merged` and set model to it"


class Initial:
    """What a run starts from.

    Args:
        loaded: the recipe that names it.

    Raises:
        SparsegradError: it is neither a run nor a LoRA adapter, or is damaged.
    """

    def __init__(self, loaded: LoadedRecipe) -> None:
        assert loaded.recipe.init_from is not None
        self.loaded, self.where = loaded, loaded.where("init_from")
        path = expanded(loaded.recipe.init_from)
        if path.name == "adapter" and is_file(path.parent / "run.json"):
            path = path.parent
        self.path = path.absolute()
        self.run: RunFiles | None = None
        if is_file(path / "run.json"):
            # Nothing of that run's model is loaded, its own code neither.
            self.run = open_run(path, ("model.trust_remote_code=true",), data=False)
        self.tensors = self.run.tensors if self.run else path / TENSORS
        self.digest = _sha256(self.tensors)

    def basis(self) -> BasisFile | None:
        """Return the basis that the adapter is written in; None for LoRA."""
        if self.run is None or not self.run.loaded.recipe.method.calibrates:
            return None
        return read_basis_of(self.run)

    def load(self, setup: Setup, method: Method) -> dict[str, Any]:
        """Copy the values into a prepared model.

        Returns:
            The ``init_from`` block of run.json.

        Raises:
            UsageError: the adapter is of another model, method or shape; names what differs.
            FileFormatError: its files are damaged.
        """
        head = self._load_run(setup, method) if self.run else self._load_peft(setup, method)
        return {
            "path": str(self.path),
            "kind": "run" if self.run else "peft",
            "digest": self.digest,
            "head": head,
        }

    def _load_run(self, setup: Setup, method: Method) -> str | None:
        assert self.run is not None
        recipe, record = self.loaded.recipe, self.run.record
        fresh_names = items(record, "model", "head", "fresh")
        tensors = (
            read_adapter(self.tensors, setup.model, [str(name) for name in fresh_names])
            if self.run.from_adapter
            else read_tensors(self.tensors)
        )
        then = _of_adapter(self.run.loaded.recipe.method, tensors)
        now = _of_adapter(recipe.method, _trained(setup))
        then |= {
            "scope": self.run.loaded.recipe.scope,
            "target modules": ", ".join(self.run.target_names),
            "weights of the base model": self.run.recorded("model", "fingerprint"),
        }
        now |= {
            "scope": recipe.scope,
            "target modules": ", ".join(target.name for target in setup.targets),
            "weights of the base model": setup.fingerprint,
        }
        drawn = _drawn(setup)
        if drawn:  # the values belong to a model in which these are what the seed made of them
            key = f"seed (it draws {drawn[0]}, which the base model's files lack)"
            then[key], now[key] = record.get("seed"), recipe.seed
        self._check_same(then, now)
        classes = record.get("task", {}).get("label_names")
        head = head_parameters(setup.model)
        fresh = bool(head) and classes != _listed(setup.task.label_names)
        if fresh:
            state = trainable_state(setup.model)
            tensors |= {name: state[name] for name in head if name in state}
        if self.run.from_adapter:
            load_checked(method, setup.model, tensors, str(self.tensors))
        else:
            self._load_named(setup, tensors)
        return None if not head else "fresh" if fresh else "loaded"

    def _load_peft(self, setup: Setup, method: Method) -> str | None:
        config, settings = self._peft_config(), method.settings
        kind = config.get("peft_type")
        if settings.peft_type is None or kind != settings.peft_type:
            raise UsageError(
                f"{self.path} is a PEFT adapter of type {kind!s:.60}, and method is "
                f"{settings.name}",
                where=self.where,
                fix="set the method of that type (LORA is lora), or name a run of this method",
            )
        said, unused = settings.from_peft(config), settings.from_peft({})
        then = {f"method.{key}": value for key, value in said.items()}
        now = {f"method.{key}": value for key, value in unused.items()}
        self._check_same(then, now | _of_adapter(settings, _trained(setup)))
        found = from_peft({_ours(name): tensor for name, tensor in self._read_peft().items()})
        state = trainable_state(setup.model)
        wanted = {name for name in state if "lora_" in name}
        given = {name for name in found if "lora_" in name}
        if given != wanted:
            name = min(given ^ wanted).replace(".default", "")
            what = (
                "the adapter has no"
                if name in {_short(n) for n in wanted - given}
                else ("no target module of this recipe takes the adapter's")
            )
            raise UsageError(f"{what} {name}", where=self.where, fix="give the same targets")
        head = head_parameters(setup.model)
        frozen = dict(setup.model.named_parameters())
        others = sorted(name for name in found if name not in wanted and name not in head)
        others = [n for n in others if n not in frozen or not _equal(found[n], frozen[n])]
        if others:
            raise UsageError(
                f"the adapter holds values of {others[0]}, which does not train here",
                where=self.where,
                fix="merge it into its model and set model to that; where the base model's files "
                "lack these weights, the seed draws them: set the seed that the adapter's run had",
            )
        kept = {
            name: tensor
            for name, tensor in found.items()
            if name in wanted or (name in state and tensor.shape == state[name].shape)
        }
        self._load_named(setup, kept)
        if not head:
            return None
        return "loaded" if all(name in kept for name in head) else "fresh"

    def _load_named(self, setup: Setup, tensors: Mapping[str, Tensor]) -> None:
        try:
            load_by_name(setup.model, tensors)
        except KeyError as error:
            raise UsageError(
                f"{error.args[0]} has another shape in {self.path}", where=self.where, fix=_FIX
            ) from None

    def _check_same(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = [key for key in then if then[key] != now.get(key)]
        if differing:
            shown = "; ".join(
                f"{key} is {now.get(key)!s:.60} here, and was {then[key]!s:.60}"
                for key in differing[:5]
            )
            raise UsageError(
                f"{self.path} was trained otherwise: {shown}", where=self.where, fix=_FIX
            )

    def _peft_config(self) -> dict[str, Any]:
        path = self.path / CONFIG
        try:
            config = plain_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FileFormatError(f"cannot be read: {error}", where=str(path)) from error
        if not isinstance(config, dict):
            raise FileFormatError("is not a JSON object", where=str(path))
        return config

    def _read_peft(self) -> dict[str, Tensor]:
        try:
            return load_file(self.tensors)
        except (OSError, SafetensorError, ValueError) as error:
            raise FileFormatError(f"cannot be read: {error}", where=str(self.tensors)) from error


def _drawn(setup: Setup) -> list[str]:
    """Parameters that were drawn from the seed and do not train."""
    trained = trainable_names(setup.model)
    fresh = setup.head.fresh if setup.head is not None else ()
    return [name for name in fresh if name not in trained]


def _equal(given: Tensor, here: Tensor) -> bool:
    return given.shape == here.shape and torch.equal(given.to(here), here.detach())


def _trained(setup: Setup) -> dict[str, Tensor]:
    return {n: p for n, p in setup.model.named_parameters() if p.requires_grad}


def _of_adapter(method: MethodSettings, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that say what an adapter is, by dotted key."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    settled = method.settle_from_adapter(shapes)
    said = settled.model_dump(exclude=set(settled.training_only))
    return {f"method.{key}": value for key, value in said.items()}


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def _short(name: str) -> str:
    return name.replace(".default", "")


def _ours(name: str) -> str:
    """The name as a PEFT folder of today has it; some versions name what they save whole."""
    return name.replace("modules_to_save.", "").replace(".default.", ".")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileFormatError(
            f"cannot be read: {error.strerror or error}", where=str(path)
        ) from error
