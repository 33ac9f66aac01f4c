"""transformers.Trainer with our optimizer, order and evaluation; it stops where a loss is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsegrad_cli import distributed
from sparsegrad_cli.data.order import EpochSampler, OrderHash
from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.methods.implementation import Method
from sparsegrad_cli.models.nan_check import INPUTS, first_non_finite
from sparsegrad_cli.models.quantized import quantized_layers
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.run.launcher import DEEPSPEED, FSDP
from sparsegrad_cli.tasks.objective import Objective
from sparsegrad_cli.training.checkpointed_trainer import CheckpointedTrainer
from sparsegrad_cli.training.evaluation import judge_splits, validation_batches


class SparsegradTrainer(CheckpointedTrainer):
    """One training run of one method.

    Args:
        recipe: the resolved recipe.
        method: has prepared the model.
        objective: how the model is judged.
        validation: split name -> tokenized data set; the first is the one that selects.
        kwargs: as CheckpointedTrainer (shelf, origins) and transformers.Trainer (model, args,
            train_dataset, data_collator, ...).
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
        self.recipe, self.method, self.objective = recipe, method, objective
        self.validation = dict(validation)
        self.score_notes: list[str] = []
        self.last_evaluation: dict[str, Any] | None = None
        self.evaluate_seconds = 0.0  # of all evaluations so far
        self._sampler: EpochSampler | None = None
        self._micro_batch = (0, 0)  # the step that is being taken, and which of its batches
        self._step_rows: int | None = None  # of all processes; None where the loss goes by token
        self._weight = 1.0  # of the micro-batch at hand, against the mean of a step's micro-batches
        with _adapters_declared(kwargs["model"]):
            super().__init__(
                order=OrderHash(every=recipe.train.logging_steps),
                eval_dataset=next(iter(self.validation.values())),
                **kwargs,
            )
        #: What splits weights over processes; None where each of them holds all.
        self.split_by = (
            FSDP if self.is_fsdp_enabled else DEEPSPEED if self.is_deepspeed_enabled else None
        )
        # By token, the model divides by the labelled tokens of the whole step; else it divides by
        # the batch, and Trainer averages the micro-batches, each by its share of the step's rows.
        self.model_accepts_loss_kwargs = objective.by_token

    # --- what is trained, and on what

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The method's own optimizer, made once."""
        if self.optimizer is None:
            assert isinstance(self.model, nn.Module)
            self.optimizer = self.method.optimizer(self.model, self.recipe.train)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        self._sampler = self._make_sampler(
            train_dataset if train_dataset is not None else self.train_dataset
        )
        return self._sampler

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # Where several processes skip what an earlier run has met, the loader forgets to tell it.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def steps_in_all(self) -> int:
        """Return the optimizer steps of the whole run."""
        steps: int = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return steps

    def _make_sampler(self, data: Any) -> EpochSampler:
        strategy = self.recipe.train.train_sampling_strategy
        lengths = None
        if strategy == "group_by_length":
            lengths = [len(ids) for ids in data["input_ids"]]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        per_step *= self.args.world_size
        return EpochSampler(
            data, seed=self.recipe.seed, strategy=strategy, lengths=lengths, batch_size=per_step
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of one optimizer step, and count its rows over all processes."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not self.objective.by_token:
            rows = torch.tensor(sum(map(_rows, batches)), device=self.args.device)
            distributed.all_reduce([rows])
            self._step_rows = int(rows)
        return batches, items

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, weighted in training so that every row of a step counts the same.

        Micro-batches of a step differ in size at the end of an epoch. Their plain mean would give
        the rows of a small one more weight than one large batch gives them.
        """
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if self._weight == 1 else loss * self._weight

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """As transformers', with the batch entered into the order hash.

        Raises:
            NonFiniteError: the loss is no number; the step is not taken.
        """
        self.order.add(inputs)
        step, number = self._micro_batch
        here = self.state.global_step + 1
        self._micro_batch = (here, number + 1 if step == here else 1)
        if self._step_rows is not None:
            parts = self.current_gradient_accumulation_steps * self.args.world_size
            self._weight = _rows(inputs) * parts / self._step_rows
        try:
            loss: torch.Tensor = super().training_step(model, inputs, *args)
        finally:
            self._weight = 1.0
        lost = not torch.isfinite(loss)
        if distributed.any(lost):  # the gradients are summed: a loss that is lost, is lost for all
            # Where weights are split, nobody can look for the module alone.
            looked = self._diverged(model, inputs, float(loss)) if lost or self.split_by else None
            raise looked if looked and lost else self._diverged_elsewhere()
        return loss

    def compute_loss_context_manager(self) -> Any:
        """Autocast, where accelerate puts none around the model's forward: that of split weights.

        FSDP2's own mixed precision would sum gradients in half precision.
        """
        if self.split_by == FSDP:
            return self.accelerator.autocast()
        return super().compute_loss_context_manager()

    def _diverged_elsewhere(self) -> NonFiniteError:
        step = self._micro_batch[0]
        return NonFiniteError(
            f"the training loss of another process is no number at step {step}: training has "
            "diverged",
            where=f"step {step}; that process says which module it was",
            fix=self._calmer(),
            details={"step": step},
        )

    def _calmer(self) -> str:
        return (
            f"lower train.learning_rate (now {self._get_learning_rate():g}), warm up "
            "(train.warmup_steps: 0.06) or clip (train.max_grad_norm: 1)"
        )

    def _diverged(self, model: nn.Module, inputs: dict[str, Any], loss: float) -> NonFiniteError:
        """Say where it happened: step, batch, rows, and the first module that went wrong."""
        model.zero_grad(set_to_none=True)

        def forward() -> torch.Tensor:
            with self.compute_loss_context_manager():
                found: torch.Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
            return found

        assert isinstance(self.model, nn.Module)
        module = first_non_finite(self.model, forward)  # not as wrapped: names are the user's
        step, number = self._micro_batch
        rows = self._rows_of(inputs)
        batches = self.args.gradient_accumulation_steps
        where = f"step {step}" + (f", batch {number} of {batches}" if batches > 1 else "")
        if rows:
            where += f", rows {', '.join(map(str, rows))} of the training data"
        lost = f"first not finite: {module}" if module else "run again, all its modules are finite"
        kept = self.shelf.newest.name if self.shelf.newest else "none was saved yet"
        return NonFiniteError(
            f"the training loss is {loss} at step {step}: training has diverged",
            where=where,
            fix="look at these rows" if module == INPUTS else self._calmer(),
            more=[lost, f"last good checkpoint: {kept}"],
            details={
                "step": step,
                "batch": number,
                "rows": rows,
                "module": module,
                "checkpoint": self.shelf.newest.name if self.shelf.newest else None,
            },
        )

    def _rows_of(self, inputs: Mapping[str, Any]) -> list[int] | None:
        """Rows of the training data that a batch was made of, if making it anew proves it."""
        data = self.train_dataset
        if self.args.world_size > 1 or data is None:
            return None
        size, batches = self.args.train_batch_size, self.args.gradient_accumulation_steps
        a_step = size * batches
        step, number = self._micro_batch
        epoch, before = divmod(step - 1, -(-len(data) // a_step))
        sampler = self._make_sampler(data)
        sampler.set_epoch(epoch)
        start = before * a_step + (number - 1) * size
        rows = list(sampler)[start : start + size]
        made = self.data_collator([data[row] for row in rows])
        names = [name for name, value in made.items() if isinstance(value, torch.Tensor)]
        same = all(torch.equal(made[name], inputs[name].cpu()) for name in names)
        return rows if same else None

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
        with self.stopped_evaluation_saved():
            judgements = judge_splits(
                self.objective,
                self.accelerator.unwrap_model(self.model),
                self.validation,
                lambda data: validation_batches(
                    data,
                    self.data_collator,
                    batch_size=self.args.eval_batch_size,
                    device=self.args.device,
                    workers=self.args.dataloader_num_workers,
                ),
                self.accelerator.autocast,
            )
        for name, judged in judgements.items():
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

    def evaluate_untrained(self) -> None:
        """Evaluate before training begins, when weights are neither wrapped nor sharded."""
        self.evaluate()

    def _note(self, notes: tuple[str, ...]) -> None:
        for note in notes:
            text = f"step {self.state.global_step}: {note}"
            if text not in self.score_notes:
                self.score_notes.append(text)


def _rows(batch: Mapping[str, Any]) -> int:
    return len(batch["labels"])


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
