"""``init_from``: start training from the adapter of another run, or from a PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli.calibration.basis_file import BasisFile
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import expanded, file_digest, is_file
from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.implementation import (
    Method,
    load_by_name,
    trainable_names,
    trainable_state,
)
from sparsegrad_cli.methods.peft_folder import CONFIG, TENSORS, from_peft, of_adapter
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.records.run import InitFromBlock
from sparsegrad_cli.restore.adapter_folder import read_adapter
from sparsegrad_cli.restore.restore import load_checked, read_basis_of
from sparsegrad_cli.restore.run_files import RunFiles, open_run
from sparsegrad_cli.tasks.setup import Setup

_FIX = "use the same settings; or export that run with `--to merged` and set model to the folder"
_SHOWN = 5  # Largest number of differences in one error.


class Initial:
    """The adapter that a run starts from.

    Args:
        loaded: The recipe with ``init_from``.

    Raises:
        SparsegradError: It is neither a run nor a PEFT folder, or is damaged.
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
            self.run = open_run(path, data=False, model=False)
        self.tensors = self.run.tensors if self.run else path / TENSORS
        self.digest = file_digest(self.tensors)

    def basis(self) -> BasisFile | None:
        """Return the basis of the adapter; None for methods without bases."""
        if self.run is None or not self.run.loaded.recipe.method.calibrates:
            return None
        return read_basis_of(self.run)

    def load(self, setup: Setup, method: Method) -> InitFromBlock:
        """Copy the adapter into a prepared model; return its record.

        Raises:
            UsageError: The adapter has another base model, method or shape. The error names the
                difference.
            FileFormatError: Its files are damaged.
        """
        if self.run is not None:
            fresh = self._load_run(self.run, setup, method)
        else:
            fresh = self._load_peft(setup, method)
        has_head = bool(head_parameters(setup.model))
        return InitFromBlock(
            path=str(self.path),
            kind="run" if self.run else "peft",
            digest=self.digest,
            head=("fresh" if fresh else "loaded") if has_head else None,
        )

    def _load_run(self, run: RunFiles, setup: Setup, method: Method) -> bool:
        """Copy the adapter of a run; return whether the head keeps its fresh values."""
        recorded_head = run.model.head
        if run.from_adapter:
            drawn = recorded_head.fresh if recorded_head else []
            tensors = read_adapter(self.tensors, setup.model, drawn)
        else:
            read = read_tensors(self.tensors)
            tensors = {method.current_name(name): tensor for name, tensor in read.items()}
        self._check_same_run(run, setup, tensors)
        classes = run.record.task.label_names if run.record.task else None
        ours = None if setup.task.label_names is None else list(setup.task.label_names)
        head = head_parameters(setup.model)
        fresh = bool(head) and classes != ours
        if fresh:
            state = trainable_state(setup.model)
            tensors |= {name: state[name] for name in head if name in state}
        if run.from_adapter:
            load_checked(method, setup.model, tensors, str(self.tensors))
        else:
            self._load_by_name(setup, tensors)
        return fresh

    def _check_same_run(self, run: RunFiles, setup: Setup, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a run with another method, scope, targets or base model."""
        recipe = self.loaded.recipe
        then = _adapter_settings(run.loaded.recipe.method, tensors) | {
            "scope": run.loaded.recipe.scope,
            "target modules": ", ".join(run.target_names),
            "weights of the base model": run.fingerprint,
        }
        now = _adapter_settings(recipe.method, _trained_parameters(setup)) | {
            "scope": recipe.scope,
            "target modules": ", ".join(target.name for target in setup.targets),
            "weights of the base model": setup.fingerprint,
        }
        drawn = _drawn_and_frozen(setup)
        if drawn:  # The adapter fits only a model with the same values in these parameters.
            key = f"seed (it draws {drawn[0]}, which the base model's files lack)"
            then[key], now[key] = run.record.seed, recipe.seed
        self._check_same(then, now)

    def _load_peft(self, setup: Setup, method: Method) -> bool:
        """Copy the adapter of a PEFT folder; return whether the head keeps its fresh values."""
        self._check_same_config(self._read_config(), setup, method.settings)
        found = from_peft(
            {_current_name(name): t for name, t in read_tensors(self.tensors).items()}
        )
        state, head = trainable_state(setup.model), head_parameters(setup.model)
        wanted = of_adapter(state)
        self._check_same_layers(of_adapter(found), wanted)
        frozen = dict(setup.model.named_parameters())
        for name in sorted(found.keys() - wanted - set(head)):
            if name not in frozen or not _equal(found[name], frozen[name]):
                raise UsageError(
                    f"the adapter holds values of {name}, which is not trained here",
                    where=self.where,
                    fix="merge the adapter into its model and set model to that; if the base "
                    "model's files lack these weights, set the seed of the adapter's run",
                )
        kept = {
            name: tensor
            for name, tensor in found.items()
            if name in wanted or (name in state and tensor.shape == state[name].shape)
        }
        self._load_by_name(setup, kept)
        return not all(name in kept for name in head)

    def _check_same_config(
        self, config: dict[str, Any], setup: Setup, settings: MethodSettings
    ) -> None:
        """Refuse a PEFT folder of another type, rank or scale."""
        kind = config.get("peft_type")
        if settings.peft_type is None or kind != settings.peft_type:
            raise UsageError(
                f"{self.path} is a PEFT adapter of type {kind!s:.60}, and method is "
                f"{settings.name}",
                where=self.where,
                fix="set the method of that type (lora for LORA), or name a run of this method",
            )
        given, unused = settings.from_peft(config), settings.from_peft({})
        then = {f"method.{key}": value for key, value in given.items()}
        now = {f"method.{key}": value for key, value in unused.items()}
        self._check_same(then, now | _adapter_settings(settings, _trained_parameters(setup)))

    def _check_same_layers(self, given: set[str], wanted: set[str]) -> None:
        if given == wanted:
            return
        name = min(given ^ wanted)
        shown = name.replace(".default", "")
        what = (
            f"the adapter has no {shown}"
            if name in wanted
            else f"the adapter has {shown}, which is not in a target module here"
        )
        raise UsageError(what, where=self.where, fix="set the targets that the adapter has")

    def _load_by_name(self, setup: Setup, tensors: Mapping[str, Tensor]) -> None:
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
                for key in differing[:_SHOWN]
            )
            raise UsageError(
                f"{self.path} was trained with other settings: {shown}",
                where=self.where,
                fix=_FIX,
            )

    def _read_config(self) -> dict[str, Any]:
        path = self.path / CONFIG
        try:
            config = plain_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FileFormatError(f"cannot be read: {error}", where=str(path)) from error
        if not isinstance(config, dict):
            raise FileFormatError("expected a JSON object", where=str(path))
        return config


def _adapter_settings(method: MethodSettings, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that define the adapter, by dotted key, without those of its training."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    settled = method.settle_from_adapter(shapes)
    defining = settled.model_dump(exclude=set(settled.training_only))
    return {f"method.{key}": value for key, value in defining.items()}


def _trained_parameters(setup: Setup) -> dict[str, Tensor]:
    return {n: p for n, p in setup.model.named_parameters() if p.requires_grad}


def _drawn_and_frozen(setup: Setup) -> list[str]:
    """Return the parameters that were drawn from the seed and are not trained."""
    trained = trainable_names(setup.model)
    fresh = setup.head.fresh if setup.head is not None else ()
    return [name for name in fresh if name not in trained]


def _equal(given: Tensor, here: Tensor) -> bool:
    return given.shape == here.shape and torch.equal(given.to(here), here.detach())


def _current_name(name: str) -> str:
    """Return the name that current PEFT versions use; some older versions wrote other names."""
    return name.replace("modules_to_save.", "").replace(".default.", ".")
