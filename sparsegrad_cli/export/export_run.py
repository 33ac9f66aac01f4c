"""One export: rebuild, write beside the place, load back, compare, and only then put it there."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.error_mapping import is_out_of_memory, mapped_errors
from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.export.base_model import BaseModel
from sparsegrad_cli.export.check_answers import (
    Loading,
    Said,
    answers_of,
    check_answers,
    plain_prompts,
)
from sparsegrad_cli.export.check_logits import allowed, compare, inputs_of, judge, logits_of
from sparsegrad_cli.export.forms import WRITERS, Written
from sparsegrad_cli.export.merged import auto_class
from sparsegrad_cli.export.model_card import CARD, model_card
from sparsegrad_cli.export.options import ExportOptions
from sparsegrad_cli.export.place import RECORD, file_sizes, free_folder, open_to_readers
from sparsegrad_cli.export.rebuild import Trained, rebuild
from sparsegrad_cli.export.run_files import RunFiles, open_run
from sparsegrad_cli.export.writing import write_export
from sparsegrad_cli.io.paths import is_folder, refuse_link
from sparsegrad_cli.models.pretrained import locate
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.store import write_json_atomic

SCHEMA = 1


@mapped_errors(
    again="run the same command again",
    memory=("--check-examples", "fewer examples, or train.use_cpu=true"),
)
def export_run(
    run: Path,
    options: ExportOptions,
    observer: Observer | None = None,
    *,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Write a run's model in a form that runs elsewhere, and check that its answers agree.

    Returns:
        The content of export.json, with ``output_dir``.

    Raises:
        UsageError: no run, a target folder that is not free or a link out of the run's, or a form
            that cannot hold it.
        SparsegradError: the check failed, or a file is gone, damaged or cannot be written. Nothing
            is left of the attempt, and what stood in the target folder is untouched.
    """
    if options.rank is not None and options.to != "lora":
        raise UsageError(f"--to {options.to} has no rank", where="--rank", fix="--to lora")
    if options.server_rank and options.to != "lora":
        raise UsageError(f"--to {options.to} has no rank", where="--server-rank", fix="--to lora")
    files = open_run(run, overrides)
    own = files.folder / f"export-{options.to}"
    wanted = options.output_dir or refuse_link(own, files.folder)
    base = Path(locate(files.loaded.recipe.model.name))
    needed = [files.folder, *([base] if is_folder(base) else [])]
    folder = free_folder(wanted, needed, overwrite=options.overwrite)
    work = _Export(files, folder, options, observer or Observer())
    write_export(folder, work.fill, overwrite=options.overwrite)
    return {**work.record, "output_dir": str(folder)}


class _Export:
    """Fills a folder that is not yet in its place.

    Args:
        folder: where it will be.
    """

    def __init__(
        self, files: RunFiles, folder: Path, options: ExportOptions, observer: Observer
    ) -> None:
        self.files, self.folder, self.options, self.observer = files, folder, options, observer
        self.record: dict[str, Any] = {}
        for note in files.notes:
            observer.note(note)
        observer.phase("load", f"{files.loaded.recipe.model.name}, {files.source}")
        # Before any folder is made: what fails to be read is no failure to write.
        self.trained: Trained | None = rebuild(files, options.examples)
        self.batches = inputs_of(self.trained.setup, options.examples)
        self.dtype: torch.dtype = getattr(torch, self.trained.recipe.model.dtype)
        self.autocast = self.trained.autocast
        self.expected = logits_of(self.trained.setup.model, self.batches, self.autocast)
        self.about = _about(self.trained, files)
        self.base = BaseModel.of(self.trained.recipe.model, self.trained.setup.model)
        self.labels = _labels(self.trained.setup.model)
        self.tokenizer, self.device = self.trained.setup.tokenizer, self.trained.setup.device
        self.prompts: list[Sequence[Turn]] = []
        self.said: list[Said] = []
        if options.to != "adapter" and self.trained.setup.conversations:
            self.prompts = plain_prompts(self.trained.setup.conversations, self.tokenizer)
            model = self.trained.setup.model
            self.said = answers_of(model, self.tokenizer, self.prompts, self.autocast)

    def fill(self, partial: Path) -> None:
        """Write, load back, compare, record; nothing stays if any of it fails."""
        assert self.trained is not None
        self.observer.phase("write", self.options.to)
        write = WRITERS[self.options.to]
        written = write(self.trained, partial, self.folder, self.options, self.batches)
        for note in written.notes:
            self.observer.note(note)
        self.trained = None  # before the same model is loaded once more
        gc.collect()
        self.observer.phase("check", f"{len(self.expected)} examples, loaded back from the files")
        autocast = self.autocast if written.as_trained else None
        model = _loaded_back(written.load)
        if _labels(model) != self.labels:
            raise SparsegradError(
                f"what was written names other labels than the run: {_labels(model)} instead of "
                f"{self.labels}",
                where="check",
            )
        got = logits_of(model, self.batches, autocast)
        checked = self._checked(got, written)
        if self.said and written.cut is not None:  # it answers as the cut change, which it holds
            self.said = answers_of(model, self.tokenizer, self.prompts)
        del model  # before it is loaded once more
        if self.said and written.loading is not None:
            checked["answers_alone"] = self._answers_alone(written.loading, checked)
        if written.on_plain is not None:
            checked["on_plain_base"] = self._on_plain(written.on_plain)
        self.record = {
            "schema": SCHEMA,
            "to": self.options.to,
            "created": now(),
            **self.about,
            **written.details,
            "check": checked,
        }
        card = model_card(self.record, self.files.record, self.base, self.labels)
        (partial / CARD).write_text(card, encoding="utf-8")
        sizes = file_sizes(partial)
        self.record |= {
            "files": sizes,
            "bytes": sum(sizes.values()),
            "load": written.snippet,
            "notes": [*self.files.notes, *written.notes],
        }
        write_json_atomic(partial / RECORD, self.record)
        open_to_readers(partial)

    def _answers_alone(self, loading: Loading, checked: dict[str, Any]) -> dict[str, int]:
        """What the folder answers in a process of its own, compared with what the run does."""
        said = f"{len(self.said)} answers, by transformers in a process of its own"
        self.observer.phase("check", said)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other process needs it
        tolerance = checked["judged"]["tolerance"]
        pad = self.tokenizer.pad_token_id
        return check_answers(self.said, loading, self.device, pad, tolerance)

    def _on_plain(self, load: Callable[[], nn.Module]) -> dict[str, Any]:
        """How far quantizing the base moved the answers: reported, for no rounding explains it."""
        found = compare(self.expected, logits_of(_loaded_back(load), self.batches))
        return {"difference": found.difference, "same_answers": found.same}

    def _checked(self, got: list[Tensor], written: Written) -> dict[str, Any]:
        """The comparison, or its refusal: with the run, or with the change that was cut."""
        cut = written.cut
        found = compare(self.expected, got)
        judged = found if cut is None else compare(cut, got)
        tolerance = self.options.tolerance
        if tolerance is None:
            tolerance = allowed(self.dtype, judged.largest, rounded=written.rounded)
        fix = "--tolerance allows more"
        if self.options.to == "merged" and self.dtype != torch.float32:
            fix = f"--to lora keeps the change apart from weights in half precision; {fix}"
        judge(judged, tolerance, fix=fix)
        return {
            "examples": len(got),
            "answers": found.answers,
            "same_answers": found.same,
            "largest_logit": found.largest,
            "difference": found.difference,
            "judged": {
                "against": "the run" if cut is None else "the cut change",
                "difference": judged.difference,
                "tolerance": tolerance,
            },
        }


def _labels(model: nn.Module) -> dict[int, str]:
    """A classifier's labels; of a language model none."""
    config: Any = model.config
    if "Sequence" not in auto_class(_plain_of(model)):
        return {}
    return {int(number): str(name) for number, name in config.id2label.items()}


def _plain_of(model: Any) -> nn.Module:
    """Return the base model inside a PEFT model."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def _about(trained: Trained, files: RunFiles) -> dict[str, Any]:
    """What the export was made from."""
    names = ["sparsegrad", "torch", "transformers", "peft"]
    if trained.recipe.model.quantization is not None:
        names.append("bitsandbytes")
    method = trained.settings.model_dump(mode="json")
    return {
        "run": str(files.folder),
        "source": files.source,
        "model": {
            "name": trained.recipe.model.name,
            "auto_class": auto_class(trained.setup.model),
            "architecture": type(trained.setup.model).__name__,
            "dtype": trained.recipe.model.dtype,
            "quantization": trained.recipe.model.quantization,
            "fingerprint": trained.setup.fingerprint,
        },
        "method": {key: method.get(key) for key in ("name", "form", "support", "density")},
        "scope": trained.recipe.scope,
        "versions": {name: _version(name) for name in names},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _loaded_back(load: Callable[[], nn.Module]) -> nn.Module:
    """What was written, read by others; whatever they say of it is one error."""
    try:
        return load()
    except SparsegradError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparsegradError(f"what was written cannot be loaded back: {reason}") from error
