"""A run's model again, in the form it was trained in: recipe -> model -> method -> adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli.calibration.basis_file import BasisFile
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.export.restore import blaming_base, check_base, restore
from sparsegrad_cli.export.run_files import RunFiles
from sparsegrad_cli.methods.implementation import Method
from sparsegrad_cli.models.quantized import dtype_of
from sparsegrad_cli.numerics.hosvd import Basis, truncated
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.report.access import dig
from sparsegrad_cli.tasks.setup import Setup, make_setup
from sparsegrad_cli.tasks.task import RowLimits

# Rows of the training data that are read: what a task is (its labels) is known from the whole file.
_TRAIN_ROWS = 32


@dataclass
class Trained:
    """A run's model with its adapter on.

    Attributes:
        recipe: of the run.
        setup: ``setup.model`` is the model in the form it was trained in, in eval mode.
        method: that prepared it.
        settings: the method's, with a core's rank settled.
        finished: training came to its end; else this is a checkpoint.
        tensors: the adapter, as :meth:`Method.load_adapter` takes it.
        bases: key -> basis, as the method uses it; empty for methods without.
        keys: target name -> key.
    """

    recipe: Recipe
    setup: Setup
    method: Method
    settings: Any
    finished: bool
    tensors: dict[str, Tensor]
    bases: dict[str, Basis] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def autocast(self) -> torch.dtype | None:
        """What float32 parameters among half-precision ones need, to compute at all."""
        train = self.recipe.train
        if self.recipe.model.dtype == "float32":
            return None
        return torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else None


def rebuild(files: RunFiles, examples: int) -> Trained:
    """Load the base model and the first validation rows, prepare as the run did, load what it left.

    Args:
        examples: validation rows to read.

    Raises:
        UsageError: the base model is another than the run's.
        DownloadError, FileFormatError: it is gone, or a file of the run is damaged.
    """
    setup = _setup(files, examples)
    method, settings, tensors, basis = restore(files, setup)
    trained = Trained(files.loaded.recipe, setup, method, settings, files.from_adapter, tensors)
    if basis is not None:
        trained.bases, trained.keys = _cut(basis, trained), dict(basis.keys)
    return trained


def _cut(basis: BasisFile, trained: Trained) -> dict[str, Basis]:
    """Key -> the directions that the method uses, in the weights' dtype, in which it uses them."""
    rank = trained.settings.basis_rank
    dtype = dtype_of(trained.setup.model.get_submodule(trained.setup.targets[0].name))
    made = {}
    for key, one in basis.bases.items():
        cut = truncated(one, rank)
        sides = (cut.q_out.to(dtype), cut.q_in.to(dtype))
        made[key] = Basis(*sides, cut.singular_out, cut.singular_in)
    return made


def _setup(files: RunFiles, examples: int) -> Setup:
    """Model, tokenizer, targets and a few rows; refused where they are not those of the run."""
    loaded = files.loaded
    with blaming_base(loaded):
        setup = make_setup(loaded, Observer(), RowLimits(_TRAIN_ROWS, examples))
    check_base(files, setup)
    labels, names = dig(files.record, "task", "label_names"), setup.task.label_names or ()
    if isinstance(labels, list) and list(names) != labels:
        raise UsageError(
            "the data has other labels than this run was trained on: "
            f"{', '.join(names)} instead of {', '.join(map(str, labels))}",
            where=loaded.where("task"),
            fix="put the original data back, or say where it is now: task.path=PATH",
        )
    return setup
