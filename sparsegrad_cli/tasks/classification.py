"""Load the model and data of a task that assigns classes or scores to texts."""

from __future__ import annotations

from sparsegrad_cli.data.batches import TextCollator
from sparsegrad_cli.data.load_task import load_task
from sparsegrad_cli.data.text_tokens import ensure_pad_token, fitting_length, tokenize
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.load_model import check_vocabulary, device_of, load_classifier
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.checks import SMOOTHED_SCORES
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.tasks.objective import Classification
from sparsegrad_cli.tasks.task import LoadedTask, RowLimits, TaskFacts


def load_classification(loaded: LoadedRecipe, limits: RowLimits | None = None) -> LoadedTask:
    """Load texts, tokenizer and classifier. The recipe's seed initializes a new head.

    Args:
        loaded: the recipe.
        limits: number of rows to load; all by default.

    Raises:
        UsageError: the recipe smooths labels, but the data holds scores.
        SparsegradError: the data, tokenizer or model cannot be used; see their loaders.
    """
    recipe = loaded.recipe
    section = limits.apply(recipe.task) if limits else recipe.task
    task = load_task(section)
    spec = task.spec
    if spec.regression and recipe.train.label_smoothing_factor:
        where = loaded.where("train.label_smoothing_factor")
        raise UsageError(SMOOTHED_SCORES, where=where, fix="leave it out")
    tokenizer = load_tokenizer(recipe.model)
    model, head = load_classifier(recipe.model, spec, recipe.seed, device_of(recipe))
    check_vocabulary(tokenizer, model, loaded.where("model.name"))
    max_length, cut_note = fitting_length(section.max_length, model.config)
    pad_note = ensure_pad_token(tokenizer, model.config)
    length_notes: list[str] = []
    train_data, validation = tokenize(
        task, tokenizer, max_length=max_length, padding=section.padding, notes=length_notes
    )
    notes = (*task.notes, head.note, pad_note, cut_note, *length_notes)
    return LoadedTask(
        TaskFacts(
            spec.name,
            "regression" if spec.regression else "classification",
            task.data_hash,
            label_names=spec.label_names,
            positive_label=spec.positive_label,
            majority=task.majority,
            notes=tuple(note for note in notes if note),
        ),
        Classification(spec, recipe.train.label_smoothing_factor),
        train_data,
        validation,
        tokenizer,
        TextCollator(tokenizer, max_length=max_length, padding=section.padding),
        model,
        head,
    )
