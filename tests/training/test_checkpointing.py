"""What a checkpoint holds beside weights and optimizer: fp16's scale, losses not yet logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from sparsegrad_cli.data.order import OrderHash
from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.run.checkpoints import Shelf
from sparsegrad_cli.training.checkpointed_trainer import CheckpointedTrainer

ORIGINS = {"basis": "a basis", "data": "rows", "model": "weights"}


def trainer_in(folder: Path, *, scale: float = 1.0, **origins: str | None) -> CheckpointedTrainer:
    """One with a gradient scaler, as fp16 on a GPU has it; accelerate makes none on a CPU."""
    trainer: Any = CheckpointedTrainer(
        shelf=Shelf(folder, "recipe", limit=None),
        order=OrderHash(every=1),
        origins=ORIGINS | origins,
        model=nn.Linear(3, 2),
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none"),
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=9)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.75), 4
    trainer.state.global_step, trainer.state.max_steps = 6, 9
    return trainer


def stepped(trainer: Any) -> None:
    """One optimizer step under the scaler; after three good ones it doubles its scale."""
    loss = trainer.accelerator.scaler.scale(trainer.model(torch.ones(1, 3)).sum())
    loss.backward()
    trainer.accelerator.scaler.step(trainer.optimizer)
    trainer.accelerator.scaler.update()


def test_the_scale_of_fp16_goes_on_where_it_was(tmp_path: Path) -> None:
    one: Any = trainer_in(tmp_path, scale=64.0)
    for _ in range(4):
        stepped(one)
    assert one.accelerator.scaler.state_dict()["scale"] == 128.0
    folder = one.save_now()
    other: Any = trainer_in(tmp_path, scale=2.0)
    other._load_scaler(str(folder))
    assert other.accelerator.scaler.state_dict() == one.accelerator.scaler.state_dict()
    for trainer in (one, other):  # the third since it doubled, in both
        stepped(trainer)
        stepped(trainer)
    assert other.accelerator.scaler.get_scale() == one.accelerator.scaler.get_scale() == 256.0


def test_losses_since_the_last_log_are_kept(tmp_path: Path) -> None:
    folder = trainer_in(tmp_path, scale=1.0).save_now()
    other: Any = trainer_in(tmp_path, scale=1.0)
    other._tr_loss, other._globalstep_last_logged = torch.tensor(0.0), 0
    other._load_from_checkpoint(str(folder))
    other.go_on()
    assert (float(other._tr_loss), other._globalstep_last_logged) == (0.75, 4)
    assert other.resumed.folder == folder and not other.resumed.stopped


@pytest.mark.parametrize(
    ("of", "words"),
    [
        ("basis", "in another basis than the run's is now"),
        ("data", "on other data than the run's is now"),
        ("model", "on another base model than the run's is now"),
    ],
)
def test_what_another_run_was_made_of_is_refused(tmp_path: Path, of: str, words: str) -> None:
    folder = trainer_in(tmp_path).save_now()
    other: Any = trainer_in(tmp_path, **{of: "another"})
    with pytest.raises(FileFormatError, match=f"checkpoint-6 was trained {words}") as caught:
        other._load_from_checkpoint(str(folder))
    assert "from a copy; --overwrite begins anew" in str(caught.value.fix)
    trainer_in(tmp_path)._load_from_checkpoint(str(folder))


def test_a_checkpoint_that_names_neither_data_nor_model_goes_on(tmp_path: Path) -> None:
    """As those of before they were kept."""
    folder = trainer_in(tmp_path).save_now()
    state = json.loads((folder / "state.json").read_text())
    del state["extras"]["data"], state["extras"]["model"]
    (folder / "state.json").write_text(json.dumps(state))
    other: Any = trainer_in(tmp_path, data="another", model="another")
    other._load_from_checkpoint(str(folder))
    assert other.resumed.folder == folder
