"""Read and write state.json of a checkpoint: the progress of a run. Imports no torch.

Checkpoints of version 0.1.0 keep a part of it in trainer_state.json. They can be read, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.records.base import Block, Count, problems
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.run import MemoryBlock, TokensBlock

STATE = "state.json"
FORMAT = 2
REMOVE = "remove the checkpoint: --resume continues from the one before, or starts again"
_TRAINER_STATE = "trainer_state.json"  # Written by version 0.1.0.

Duration = Annotated[float, Field(ge=0, lt=1e12)]


class Progress(Block):
    """The progress of a run. With the tensors, it determines what the run does next."""

    model_config = ConfigDict(frozen=False)  # The training loop updates it.

    step: Count = Field(0, description="Optimizer steps taken.")
    max_steps: Count = Field(description="Optimizer steps of the whole run.")
    best_score: float | None = None
    best_step: Count | None = Field(None, description="The step of the best evaluation.")
    evaluations_since_best: Count = 0
    stopped_early: bool = Field(False, description="Early stopping has ended the run.")
    evaluation_due: bool = Field(False, description="The evaluation of this step was interrupted.")
    save_due: bool = Field(False, description="A checkpoint was due after that evaluation.")
    logged_step: Count = Field(0, description="The last step whose loss was logged.")
    loss_sums: list[float] = Field(
        [0.0], description="Loss since the last logged step, summed in each process."
    )

    @property
    def over(self) -> bool:
        """Whether the run has taken its last step."""
        return self.stopped_early or self.step >= self.max_steps

    def count_evaluation(self, score: float, metric: str, patience: int | None) -> bool:
        """Update the best score and early stopping; return whether ``score`` is a new best.

        Args:
            score: Of the evaluation after this step.
            metric: Says whether higher is better.
            patience: Evaluations without a new best after which the run stops early, if any.
        """
        best = self.best_score
        improved = best is None or (score != best and scale_of(metric).best((score, best)) == score)
        if improved:
            self.best_score, self.best_step = score, self.step
        self.evaluations_since_best = 0 if improved else self.evaluations_since_best + 1
        self.stopped_early = patience is not None and self.evaluations_since_best >= patience
        return improved


class OrderState(Block):
    """Digest chains over the batches so far; see data/order.py."""

    digest: str = ""
    kept: dict[str, str] = Field({})
    rows: str | None = None
    kept_rows: dict[str, str] = Field({})


class Measured(Block):
    """Times and memory so far, to which a resumed run adds its own."""

    train_s: Duration = 0.0
    steps_s: list[Duration] = Field([], description="Seconds of each step, the last ones.")
    memory: MemoryBlock | None = None
    tokens: TokensBlock | None = None


class LoopState(Block):
    """The state that the training loop itself keeps."""

    progress: Progress
    order: OrderState = OrderState()
    origins: dict[str, str | None] = Field({}, description="Digests of what the run is made of.")
    measured: Measured = Measured()
    scaler: dict[str, Any] | None = Field(None, description="State of fp16's gradient scaler.")


class CheckpointState(LoopState):
    """The content of state.json."""

    format: int = FORMAT
    optimizer_groups: list[dict[str, Any]]
    optimizer_numbers: dict[str, Any]
    scheduler: dict[str, Any]
    random: list[dict[str, Any]] = Field(description="Generators without tensors, by process.")

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"format": self.format, **super().to_json()}


def read_state(folder: Path) -> CheckpointState:
    """Read state.json of a checkpoint.

    Raises:
        FileFormatError: The file is missing, damaged or of another format.
    """
    path = folder / STATE
    try:
        content = plain_json(path.read_bytes())
        if content.get("format") == 1:
            path = folder / _TRAINER_STATE
            content = _converted(content, plain_json(path.read_bytes()))
            path = folder / STATE
        if content.get("format") != FORMAT:
            what = f"has format {content.get('format')!r:.40}; this version reads 1 and {FORMAT}"
            raise FileFormatError(what, where=str(path), fix=REMOVE)
        return CheckpointState.model_validate(content)
    except ValidationError as error:
        raise FileFormatError(problems(error), where=str(path), fix=REMOVE) from error
    except (KeyError, TypeError, AttributeError) as error:
        what = f"is not the state of a checkpoint: {type(error).__name__} {error}"
        raise FileFormatError(what, where=str(path), fix=REMOVE) from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot be read: {error}", where=str(path), fix=REMOVE) from error


def write_state(folder: Path, state: CheckpointState) -> None:
    """Write state.json into a folder; not atomic."""
    (folder / STATE).write_text(json.dumps(state.to_json()), encoding="utf-8")


def _converted(old: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the two files of format 1 to format 2.

    Raises:
        KeyError, TypeError, AttributeError: The files are not what version 0.1.0 writes.
    """
    extras, callbacks = old["extras"], trainer["stateful_callbacks"]
    control = callbacks["TrainerControl"]["args"]
    stopping = callbacks.get("EarlyStoppingCallback") or {}
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    patience = stopping.get("args", {}).get("early_stopping_patience")
    # The trainer sets this flag at the last step, too, which is not an early stop.
    stopped = bool(control["should_training_stop"]) and (
        trainer["global_step"] < trainer["max_steps"]
        or (patience is not None and waited >= patience)
    )
    sums, logged = extras["loss"]
    order = extras["order"]
    return {
        "format": FORMAT,
        "progress": {
            "step": trainer["global_step"],
            "max_steps": trainer["max_steps"],
            "best_score": trainer["best_metric"],
            "best_step": trainer["best_global_step"] or None,
            "evaluations_since_best": waited,
            "stopped_early": stopped,
            "evaluation_due": bool(control["should_evaluate"]),
            "save_due": bool(control["should_save"]),
            "logged_step": logged,
            "loss_sums": sums,
        },
        "order": {key: order[key] for key in OrderState.model_fields if key in order},
        "origins": {
            key: extras[key] for key in ("data", "model", "basis", "start") if key in extras
        },
        "measured": extras["measured"],
        "scaler": extras.get("scaler"),
        **{
            key: old[key]
            for key in ("optimizer_groups", "optimizer_numbers", "scheduler", "random")
        },
    }
