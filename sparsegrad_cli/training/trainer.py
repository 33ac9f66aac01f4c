"""transformers.Trainer with our optimizer, order, evaluation and pickle-free checkpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from sparsegrad_cli.errors import FileFormatError, SparsegradError
from sparsegrad_cli.methods.base import Method, load_by_name, trainable_state
from sparsegrad_cli.modeling.quantized import quantized_layers
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.training import checkpoint as files
from sparsegrad_cli.training.objective import Objective
from sparsegrad_cli.training.order import EpochSampler, OrderHash


class SparsegradTrainer(Trainer):
    """One training run of one method.

    Args:
        recipe: the resolved recipe.
        method: has prepared the model.
        objective: how the model is judged.
        validation: split name -> tokenized data set; the first is the one that selects.
        kwargs: as transformers.Trainer (model, args, train_dataset, data_collator, ...).
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        method: Method,
        objective: Objective,
        validation: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        self.optimizer: Any = None
        self.control: Any = None
        self.recipe, self.method, self.objective = recipe, method, objective
        self.validation = dict(validation)
        self.order = OrderHash(every=recipe.train.logging_steps)
        self.score_notes: list[str] = []
        self.last_evaluation: dict[str, Any] | None = None
        self.evaluate_seconds = 0.0  # of all evaluations so far
        with _adapters_declared(kwargs["model"]):
            super().__init__(eval_dataset=next(iter(self.validation.values())), **kwargs)
        # By token, the model divides by the labelled tokens of the whole step; else it divides by
        # the batch, and Trainer averages the micro-batches.
        self.model_accepts_loss_kwargs = objective.by_token

    # --- what is trained, and on what

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The method's own optimizer, made once."""
        if self.optimizer is None:
            assert isinstance(self.model, nn.Module)
            self.optimizer = self.method.optimizer(self.model, self.recipe.train)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        data = train_dataset if train_dataset is not None else self.train_dataset
        assert data is not None
        strategy = self.recipe.train.train_sampling_strategy
        lengths = None
        if strategy == "group_by_length":
            lengths = [len(ids) for ids in data["input_ids"]]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        per_step *= self.args.world_size
        return EpochSampler(
            data, seed=self.recipe.seed, strategy=strategy, lengths=lengths, batch_size=per_step
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return (
            torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """As transformers', with the batch entered into the order hash."""
        self.order.add(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping the norm is wanted by nobody, and costs a pass over all gradients.
        return super()._get_grad_norm(model, grad_norm) if self.args.max_grad_norm > 0 else None

    # --- evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """All validation splits: ``eval_score`` and ``eval_loss`` of the first, and all metrics."""
        started = time.perf_counter()
        flat: dict[str, float] = {}
        values: dict[str, dict[str, float]] = {}
        for name, data in self.validation.items():
            judged = self.objective.judge(self, name, data)
            values[name] = judged.values
            self._note(judged.notes)
            if "eval_score" not in flat:
                flat["eval_score"] = judged.values[self.objective.metric]
                flat["eval_loss"] = judged.loss
            flat.update({f"eval_{name}_{key}": value for key, value in judged.values.items()})
        flat["epoch"] = float(self.state.epoch or 0.0)
        self.last_evaluation = {
            "step": self.state.global_step,
            "epoch": flat["epoch"],
            "metric": self.objective.metric,
            "score": flat["eval_score"],
            "loss": flat["eval_loss"],
            "values": values,
        }
        self.evaluate_seconds += time.perf_counter() - started
        self.log(dict(flat))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, flat)
        return flat

    def _note(self, notes: tuple[str, ...]) -> None:
        for note in notes:
            text = f"step {self.state.global_step}: {note}"
            if text not in self.score_notes:
                self.score_notes.append(text)

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N whole or not at all, then drop what is over save_total_limit."""
        run_dir = Path(self.args.output_dir)
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or best == folder:
                self.state.best_model_checkpoint = str(best)
        self._export_callback_states()
        if self.args.should_save:
            files.write_folder(folder, self._fill_checkpoint)
            rotate_checkpoints(
                str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _export_callback_states(self) -> None:
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _fill_checkpoint(self, folder: Path) -> None:
        assert isinstance(self.model, nn.Module) and self.optimizer is not None
        files.save_training_state(
            folder,
            trainable_state(self.model),
            self.optimizer,
            self.lr_scheduler,
            {"order": self.order.state()},
        )
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def save_now(self) -> Path:
        """A checkpoint of this very step (Ctrl-C); the newest whole one."""
        assert isinstance(self.model, nn.Module)
        self._save_checkpoint(self.model, None)
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        tensors = files.read_tensors(folder / files.TRAINABLE)
        assert isinstance(self.model, nn.Module)
        expected = set(trainable_state(self.model))
        try:
            if set(tensors) != expected:
                raise KeyError(sorted(set(tensors) ^ expected)[0])
            load_by_name(self.model, tensors)
        except KeyError as error:
            raise FileFormatError(
                f"the checkpoint does not fit this recipe: {error.args[0]}",
                where=str(folder),
                fix="resume with the recipe that the run was started with (recipe.yaml in it)",
            ) from None
        extras = files.load_state_json(folder)["extras"]
        self.order.load_state(extras["order"])

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None and isinstance(self.model, nn.Module)
        folder = Path(self.state.best_model_checkpoint)
        try:
            load_by_name(self.model, files.read_tensors(folder / files.TRAINABLE))
        except KeyError as error:
            raise FileFormatError(
                f"the best checkpoint is another run's: {error.args[0]}", where=str(folder)
            ) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            files.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            files.load_random(Path(checkpoint))

    def drop_checkpoints(self) -> None:
        """Remove all checkpoints of a finished run whose adapter is saved."""
        for folder in Path(self.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _adapters_declared(model: nn.Module) -> Iterator[None]:
    """Say to Trainer what it asks a quantized model for: that something trains beside its weights.

    It knows of adapters only those that peft has hung onto the model as a whole, and refuses any
    other. A core, and LoRA's layers put into the targets one by one, are adapters all the same;
    recipe.quantization has refused what is not. The mark is taken off again: nothing else of what
    transformers does with its own adapters holds here.
    """
    if not quantized_layers(model):
        yield
        return
    marked: Any = model
    before = marked._hf_peft_config_loaded
    marked._hf_peft_config_loaded = any(p.requires_grad for p in model.parameters())
    try:
        yield
    finally:
        marked._hf_peft_config_loaded = before


def check_finite(loss: float, step: int, learning_rate: float) -> None:
    """Raises SparsegradError when the training loss is no longer a number."""
    if not np.isfinite(loss):
        raise SparsegradError(
            f"the training loss is {loss} at step {step}: training has diverged",
            where="train.learning_rate",
            fix=f"lower it (now {learning_rate:g}), warm up (train.warmup_steps: 0.06) "
            "or clip (train.max_grad_norm: 1)",
        )
