"""Load a trained classifier or regressor, and label texts with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsegrad_cli.data.batches import TextCollator
from sparsegrad_cli.data.multilabel_metrics import DEFAULT_THRESHOLD
from sparsegrad_cli.data.text_tokens import TextEncoder, ensure_pad_token, fitting_length
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.generate.peft_folder import base_of, load_onto, tokenizer_in
from sparsegrad_cli.io.paths import expanded, is_file, is_folder
from sparsegrad_cli.methods.peft_folder import CONFIG
from sparsegrad_cli.models.digests import fingerprint
from sparsegrad_cli.models.load_model import device_of, load_by_auto_class, load_classifier
from sparsegrad_cli.models.precision import autocast_to_use
from sparsegrad_cli.models.pretrained import load_configuration, load_tokenizer
from sparsegrad_cli.models.quantized import move_model
from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.models.unpadding import use_unpadding
from sparsegrad_cli.predict.peft_labels import labels_of_peft
from sparsegrad_cli.predict.source import find_source
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.tasks import CHAT_TASKS, GLUE_TASKS, TaskSpec
from sparsegrad_cli.records.run import RunRecord, TaskBlock
from sparsegrad_cli.restore.exported_adapter import SETTINGS, load_adapter, read_settings
from sparsegrad_cli.restore.restore import (
    THRESHOLD,
    BaseModule,
    base_model_errors,
    check_base,
    restore,
)
from sparsegrad_cli.restore.run_files import RunFiles, open_run

DEFAULT_LENGTH = 128
_AUTO = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of some texts.

    Attributes:
        probabilities: (N, classes) float64 whose rows sum to 1; of a model that gives several
            labels, (N, labels) from 0 to 1 each; of a regressor, (N, 1) scores.
        cut: positions of the texts that were longer than the model reads.
    """

    probabilities: np.ndarray
    cut: list[int]


@dataclass(frozen=True)
class Classifier:
    """A model that labels texts.

    Attributes:
        model: in eval mode, on its device.
        encoder: turns texts into token ids.
        collator: pads them to batches.
        label_names: names of the classes; None for a regressor.
        text_columns: names of the columns that it was trained on, one or two; empty if unknown.
        pair: whether it reads two texts of every row.
        about: what was loaded, for a note.
        autocast: dtype of autocast, if it was trained under it in half precision.
        threshold: of a model that gives several labels: the probability from which it gives one.
        task: the task that it was trained on; None if it is unknown, as of an export.
    """

    model: nn.Module
    encoder: TextEncoder
    collator: TextCollator
    label_names: tuple[str, ...] | None
    text_columns: tuple[str, ...]
    pair: bool
    about: str
    autocast: torch.dtype | None = None
    threshold: float | None = None
    task: TaskSection | None = None

    @property
    def multilabel(self) -> bool:
        """Whether it may give a text several labels, or none."""
        return self.threshold is not None

    @property
    def reads_empty_texts(self) -> bool:
        """Whether an empty text has a token: one that the tokenizer adds to every text."""
        return self.encoder.special > 0

    def predict(
        self,
        texts: Sequence[list[str]],
        batch_size: int,
        done: Callable[[int], None] = lambda rows: None,
    ) -> Predictions:
        """Label texts. Rows of similar length share a batch; the result is in the given order.

        Args:
            texts: the first texts, and the second ones if the classifier reads two; one length.
            batch_size: rows of a batch. It changes results by rounding alone.
            done: is called after each batch with the number of rows that are labelled.
        """
        columns, cut = self.encoder.encode(*texts)
        lengths = [sum(mask) for mask in columns["attention_mask"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        found: np.ndarray | None = None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            values = self._logits([{n: c[at] for n, c in columns.items()} for at in rows])
            if found is None:
                found = np.empty((len(order), values.shape[1]))
            found[rows] = values
            done(start + len(rows))
        assert found is not None
        if self.multilabel:
            return Predictions(_sigmoid(found), cut)
        return Predictions(found if self.label_names is None else _softmax(found), cut)

    def _logits(self, rows: list[dict[str, list[int]]]) -> np.ndarray:
        device = next(self.model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in self.collator(rows).items()}
        half = self.autocast
        context = torch.autocast(device.type, half) if half else nullcontext()
        with torch.no_grad(), context:
            logits = self.model(**inputs).logits
        values: np.ndarray = logits.double().cpu().numpy()
        if not np.isfinite(values).all():
            raise FileFormatError("the model answers NaN or Inf", where=self.about)
        return values


def _sigmoid(logits_NL: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    result: np.ndarray = expit(logits_NL)
    return result


def _softmax(logits_NC: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    result: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def load_trained_classifier(
    source: str, overrides: tuple[str, ...] = (), *, max_length: int | None = None
) -> Classifier:
    """Load the classifier that ``source`` names, with the base model if it needs one.

    Args:
        source: a run's folder, a comparison's (its best run), an export (``merged``, ``lora`` or
            ``adapter``), a PEFT folder, or a folder or hub id of any classifier of transformers.
        overrides: ``key.path=value`` for files of a run that have moved since.
        max_length: tokens of an example; by default as in training.

    Raises:
        UsageError: there is no such folder, or it does not hold a classifier.
        FileFormatError, DownloadError: a file is missing or damaged, or cannot be downloaded.
    """
    source, note, _ = find_source(source)
    folder = expanded(source)
    if is_file(folder / "run.json"):
        return _of_run(folder, note, overrides, max_length)
    if overrides:
        raise UsageError(
            f"{overrides[0]} applies to runs, and {source} is not a run", where="command line"
        )
    if is_file(folder / CONFIG):
        return _of_peft(source, folder, max_length)
    if is_file(folder / SETTINGS):
        base = read_settings(folder).model
        section = ModelSection(name=base.name, revision=base.revision, dtype=base.dtype)
        model = load_adapter(folder)
        return _of_transformers(source, model, load_tokenizer(section), max_length)
    _check_folder(source, folder)
    return _plain(source, max_length)


def _check_folder(source: str, folder: Path) -> None:
    """Refuse what is on this machine, or would be, and holds no classifier.

    Raises:
        UsageError: the folder does not exist or holds nothing to predict with, or it is a file.
    """
    fix = "give the folder of a run, of a comparison or of an export"
    if is_file(folder):
        if folder.suffix in (".yaml", ".yml"):
            fix = f"`sparsegrad train {source}` first, then give the run's folder"
        raise UsageError(
            f"expected a run's folder, got the file {source}", where="command line", fix=fix
        )
    if is_folder(folder):
        if not is_file(folder / "config.json"):
            what = f"the folder {source} holds no run, export or model"
            raise UsageError(what, where="command line", fix=fix)
        return
    # A hub id has the same form: a folder is meant where the one above it exists.
    if source.startswith((".", "/", "~")) or ("/" in source and is_folder(folder.parent)):
        raise UsageError(f"the folder {source} does not exist", where="command line", fix=fix)


def _of_run(
    folder: Path, note: str, overrides: tuple[str, ...], max_length: int | None
) -> Classifier:
    files = open_run(folder, overrides, data=False)
    recipe, spec = files.loaded.recipe, _spec_of(files)
    with base_model_errors(files.loaded):
        tokenizer = load_tokenizer(recipe.model)
        device = device_of(recipe)
        model, _ = load_classifier(recipe.model, spec, recipe.seed, device)
    model = move_model(model, device)
    targets = find_targets(model, recipe.targets)
    base = BaseModule(model, targets, fingerprint(model, targets))
    check_base(files, base)
    restore(files, base)
    threshold, threshold_note = _threshold_of(files)
    notes = (note or str(folder), *files.notes, threshold_note)
    about = "; ".join(part for part in notes if part)
    return _ready(
        model,
        tokenizer,
        label_names=spec.label_names,
        text_columns=spec.text_columns,
        length=max_length or recipe.task.max_length,
        padding=recipe.task.padding,
        about=about,
        autocast=autocast_to_use(recipe),
        threshold=threshold,
        task=recipe.task,
        unpadded=recipe.train.unpadded,
    )


def _threshold_of(files: RunFiles) -> tuple[float | None, str | None]:
    """Return the threshold of a run with several labels a row, and a note if it has none yet."""
    task = files.record.task
    if task is None or task.kind != "multilabel":
        return None, None
    if files.threshold is not None:
        return files.threshold, None
    return DEFAULT_THRESHOLD, f"no threshold is chosen yet: {DEFAULT_THRESHOLD} is used"


def _spec_of(files: RunFiles) -> TaskSpec:
    """Return the task of a run without its data."""
    recipe, record = files.loaded.recipe, files.record
    if recipe.task.name in CHAT_TASKS:
        raise UsageError(
            f"expected a run that labels texts, got a run of {recipe.task.name}: {files.folder}",
            where="command line",
            fix=f"sparsegrad generate {files.folder}",
        )
    task = record.task or TaskBlock()
    names = None if task.regression else tuple(task.label_names or ())
    if names == ():
        raise FileFormatError(
            "run.json is incomplete: task.label_names is missing",
            where=str(files.folder / "run.json"),
            fix="restore the file from a copy, or train again",
        )
    return TaskSpec(
        name=recipe.task.name,
        text_columns=_text_columns(files.loaded, record),
        label_column="label",
        label_names=names,
        regression=task.regression,
        metric=task.metric or "",
        metrics=(task.metric or "",),
        multilabel=task.kind == "multilabel",
    )


def _text_columns(loaded: LoadedRecipe, record: RunRecord) -> Any:
    """Return the text columns; runs of earlier versions record them in the recipe alone."""
    section = loaded.recipe.task
    if record.task and record.task.text_columns:
        return tuple(record.task.text_columns)
    if section.name.startswith("glue/"):
        return GLUE_TASKS[section.name.removeprefix("glue/")].text_columns
    if section.name.startswith("builtin:"):
        return ("sentence",)
    columns = section.columns
    first = (columns and columns.text) or "text"
    return (first, columns.text_pair) if columns and columns.text_pair else (first,)


def _plain(source: str, max_length: int | None) -> Classifier:
    """Load a classifier of transformers, such as an export of ``--to merged``."""
    section = ModelSection(name=source)
    kinds = getattr(load_configuration(section), "architectures", None) or ["a model"]
    if not kinds[0].endswith("ForSequenceClassification"):
        raise UsageError(
            f"expected a classifier, got {kinds[0]} in {source}",
            where="command line",
            fix="a run's folder, or a folder that export --to merged wrote",
        )
    tokenizer = load_tokenizer(section)
    model = load_by_auto_class(_AUTO, section, {})
    return _of_transformers(source, model, tokenizer, max_length)


def _of_peft(source: str, folder: Path, max_length: int | None) -> Classifier:
    """Load the base model of a PEFT folder with as many labels as its head has, and the adapter."""
    base, revision = base_of(folder)
    section = ModelSection(name=base, revision=revision)
    labels = labels_of_peft(folder)
    settings = {
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
        "problem_type": labels.problem_type,
    }
    if labels.threshold is not None:
        settings[THRESHOLD] = labels.threshold
    model = load_by_auto_class(_AUTO, section, settings)
    model = load_onto(model, folder)
    tokenizer = tokenizer_in(folder) or load_tokenizer(section)
    found = _of_transformers(source, model, tokenizer, max_length)
    return replace(found, about=f"{source}; {labels.note}") if labels.note else found


def _of_transformers(
    source: str, model: nn.Module, tokenizer: Any, max_length: int | None
) -> Classifier:
    config: Any = model.config
    threshold, note = None, None
    if config.problem_type == "multi_label_classification":
        threshold = getattr(config, THRESHOLD, None)
        if not isinstance(threshold, float) or not 0 <= threshold <= 1:
            note = f"{source} names no threshold: {DEFAULT_THRESHOLD} is used"
            threshold = DEFAULT_THRESHOLD
    regression = config.problem_type == "regression" or (
        config.num_labels == 1 and threshold is None
    )
    names = None if regression else tuple(config.id2label[at] for at in range(config.num_labels))
    return _ready(
        model,
        tokenizer,
        label_names=names,
        text_columns=(),
        length=max_length or DEFAULT_LENGTH,
        padding="dynamic",
        about=note or source,
        threshold=threshold,
    )


def _ready(
    model: nn.Module,
    tokenizer: Any,
    *,
    label_names: tuple[str, ...] | None,
    text_columns: tuple[str, ...],
    length: int,
    padding: Any,
    about: str,
    autocast: torch.dtype | None = None,
    threshold: float | None = None,
    task: TaskSection | None = None,
    unpadded: bool = True,
) -> Classifier:
    config: Any = model.config
    ensure_pad_token(tokenizer, config)
    length, _ = fitting_length(length, config)
    if unpadded:
        with suppress(UsageError):  # It then computes padding too, and answers the same.
            use_unpadding(model)
    pair = len(text_columns) == 2
    return Classifier(
        model.eval(),
        TextEncoder(tokenizer, pair=pair, max_length=length, padding=padding),
        TextCollator(tokenizer, max_length=length, padding=padding),
        label_names,
        text_columns,
        pair,
        about,
        autocast,
        threshold,
        task,
    )
