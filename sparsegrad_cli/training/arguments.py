"""A recipe's ``train`` section as transformers.TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.trackers import PROJECT, named, study_of
from sparsegrad_cli.records.metric_direction import scale_of

# Ours, not TrainingArguments'. Of save_total_limit training/checkpoint_folder.py takes care.
_OWN = {
    "early_stopping_patience",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
}


def training_arguments(recipe: Recipe, output_dir: Path, metric: str) -> Any:
    """TrainingArguments of a run: the recipe's keys under their own names, and what we fix.

    ``metric`` is the one that selects the best model.
    """
    from transformers import TrainingArguments

    train = recipe.train
    settings = train.model_dump(exclude=_OWN)
    save = train.save_strategy or train.eval_strategy
    settings["save_strategy"] = save
    if save == "steps":
        settings["save_steps"] = train.save_steps or train.eval_steps or 500
    settings["load_best_model_at_end"] = (
        train.load_best_model_at_end and train.eval_strategy != "no" and save != "no"
    )
    if not train.gradient_checkpointing:
        settings.pop("gradient_checkpointing")
    # CUDA or the CPU, as device_of says: nothing here has met another kind of device.
    settings["use_cpu"] = train.use_cpu or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to=list(named(train.report_to)),
        run_name=output_dir.absolute().name,
        project=(study_of(output_dir) or Path(PROJECT)).name,
        metric_for_best_model="eval_score",
        greater_is_better=not scale_of(metric).lower_is_better,
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        dataloader_pin_memory=not settings["use_cpu"],
        # A loss that is not finite ends the run with a message; it is not averaged away.
        logging_nan_inf_filter=False,
        # Data sets hold what the collator wants and nothing else.
        remove_unused_columns=False,
        save_only_model=False,
        # No buffer changes while training; bases are buffers, and would be sent at every step.
        ddp_broadcast_buffers=False,
        **settings,
    )
    if arguments.n_gpu > 1:
        # One process is one GPU. Trainer would multiply the batch by their number and train copies
        # of the model (nn.DataParallel), which patched and sparse layers do not survive.
        arguments._n_gpu = 1
    return arguments
