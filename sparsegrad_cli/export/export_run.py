"""Export a run: restore its model, write it, load it back, compare, and rename into place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.error_mapping import first_line, is_out_of_memory, mapped_errors
from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.export.base_model import CLASSIFIER, BaseModel, auto_class
from sparsegrad_cli.export.check_answers import (
    Loading,
    RunAnswer,
    answers_of,
    check_answers,
    plain_prompts,
)
from sparsegrad_cli.export.check_logits import (
    Agreement,
    check_agreement,
    check_batches,
    compare,
    logits_of,
    tolerance_for,
)
from sparsegrad_cli.export.forms import FORMS, ExportJob, ExportOptions, Written
from sparsegrad_cli.export.hub_upload import (
    Destination,
    check_target,
    public_files,
    refuse_local_paths,
    sizes,
)
from sparsegrad_cli.export.model_card import CARD, CardContent, base_title, model_card
from sparsegrad_cli.export.output_folder import (
    check_output_folder,
    file_sizes,
    make_readable,
    write_export,
)
from sparsegrad_cli.io.paths import expanded, is_folder, refuse_link
from sparsegrad_cli.models.pretrained import locate
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.environment import package_versions
from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.records.export import (
    AnswersAlone,
    ExportCheck,
    ExportedMethod,
    ExportedModel,
    ExportRecord,
    Judged,
    OnPlainBase,
)
from sparsegrad_cli.records.store import EVALUATION, EXPORT, load, write
from sparsegrad_cli.report.units import counted, format_bytes
from sparsegrad_cli.restore.restore import THRESHOLD, TrainedModel, load_trained
from sparsegrad_cli.restore.run_files import RunFiles, open_run


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
) -> ExportRecord:
    """Write a run's model in another form, and check that it computes the same.

    Args:
        run: The run's folder.
        options: What to export, and where.
        observer: Receives phases and notes.
        overrides: ``key.path=value`` for files that have moved since the run.

    Returns:
        The content of export.json, with ``output_dir``.

    Raises:
        UsageError: The run or the output folder is refused, or the form cannot hold the change.
        UploadError: The hub refuses the upload or cannot be reached. It is asked before the export,
            so that most refusals come early. A complete export is kept.
        SparsegradError: The check failed, or a file is missing, damaged or cannot be written.
            The temporary files are removed, and the output folder is unchanged.
    """
    for option, given in (("--rank", options.rank), ("--server-rank", options.server_rank)):
        if given and not FORMS[options.to].has_rank:
            ranked = " or ".join(f"--to {name}" for name, form in FORMS.items() if form.has_rank)
            raise UsageError(f"--to {options.to} has no rank", where=option, fix=ranked)
    files = open_run(run, overrides)
    default = files.folder / f"export-{options.to}"
    wanted = options.output_dir or refuse_link(default, files.folder)
    base = Path(locate(files.loaded.recipe.model.name))
    needed = [files.folder, *([base] if is_folder(base) else [])]
    folder = check_output_folder(wanted, needed, overwrite=options.overwrite)
    destination = check_target(options.hub) if options.hub else None
    export = _Export(files, folder, options, observer or Observer())
    write_export(folder, export.fill, overwrite=options.overwrite)
    assert export.record is not None
    record = export.record.changed(output_dir=str(folder))
    return record if destination is None else export.push(record, destination)


class _Export:
    """An export in progress.

    Everything that the checks need from the run is computed first. Its model can then be freed
    before the written files are loaded.
    """

    def __init__(
        self, files: RunFiles, folder: Path, options: ExportOptions, observer: Observer
    ) -> None:
        self.files, self.folder, self.options, self.observer = files, folder, options, observer
        self.form = FORMS[options.to]
        self.record: ExportRecord | None = None
        self.content: CardContent | None = None
        self.evaluations = _evaluations(files)
        for note in files.notes:
            observer.note(note)
        observer.phase("load", f"{files.loaded.recipe.model.name}, {files.source}")
        trained = load_trained(files, options.examples)
        model, setup = trained.setup.model, trained.setup
        if setup.unpadding is not None:
            setup.unpadding.active = False  # Other libraries read the files with padding.
        self.trained: TrainedModel | None = trained
        self.tokenizer, self.device, self.autocast = setup.tokenizer, setup.device, trained.autocast
        self.dtype: torch.dtype = getattr(torch, trained.recipe.model.dtype)
        self.batches = check_batches(setup, options.examples)
        self.logits = logits_of(model, self.batches, self.autocast)
        self.labels = _labels(model)
        self.base = BaseModel.of(trained.recipe.model, model)
        self.origin = _origin(trained, files)
        self.prompts: list[Sequence[Turn]] = []
        self.answers: list[RunAnswer] = []
        if self.form.is_foreign and setup.conversations:
            self.prompts = plain_prompts(setup.conversations, self.tokenizer)
            self.answers = answers_of(model, self.tokenizer, self.prompts, self.autocast)

    def fill(self, partial: Path) -> None:
        """Write the form into a folder, load it back, compare, and write model card and record."""
        assert self.trained is not None
        self.observer.phase("write", self.options.to)
        job = ExportJob(self.trained, partial, self.folder, self.options, self.batches)
        written = self.form.write(job)
        for note in written.notes:
            self.observer.note(note)
        del job
        self.trained = None  # Frees the model before it is loaded once more.
        gc.collect()
        self.observer.phase("check", f"{len(self.logits)} examples, loaded back from the files")
        check = self._check(written)
        record = ExportRecord.model_validate(
            {
                "to": self.options.to,
                "created": now(),
                **self.origin,
                **written.details,
                "check": check,
            }
        )
        self.content = CardContent(
            record, self.files.record, self.base, self.labels, self.evaluations
        )
        (partial / CARD).write_text(model_card(self.content), encoding="utf-8")
        sizes = file_sizes(partial)
        self.record = record.changed(
            files=sizes,
            bytes=sum(sizes.values()),
            load=written.snippet,
            pipeline=self.content.pipeline_line(str(self.folder)),
            notes=[*self.files.notes, *written.notes],
        )
        write(self.record, partial / EXPORT)
        make_readable(partial)

    def push(self, record: ExportRecord, destination: Destination) -> ExportRecord:
        """List the files that go to the hub, and upload them; return the record with ``hub``."""
        assert self.content is not None
        recipe, target = self.files.loaded.recipe, destination.target
        name = recipe.model.name
        card = model_card(self.content, target.repository)
        files = public_files(self.folder, record, card, base_title(name))
        local = [self.files.folder, self.folder, Path.cwd()]
        local += [Path(locate(name))] if is_folder(name) else []
        local += [expanded(recipe.task.path)] if recipe.task.path else []
        refuse_local_paths(files, local)
        size = sizes(files)
        total = f"{counted(len(size), 'file')}, {format_bytes(sum(size.values()))}"
        self.observer.phase("upload", f"{total}, to {target.repository} ({target.visibility})")
        for path, count in size.items():
            self.observer.note(f"{path}, {format_bytes(count)}")
        return record.changed(hub=destination.upload(files, self.folder))

    def _check(self, written: Written) -> ExportCheck:
        """Compare labels, logits and answers of the written files with those of the run."""
        model = _load_back(written.load)
        if _labels(model) != self.labels:
            raise SparsegradError(
                f"the written files have other labels than the run: expected {self.labels}, got "
                f"{_labels(model)}",
                where="check",
            )
        autocast = self.autocast if written.as_trained else None
        logits = logits_of(model, self.batches, autocast)
        found = compare(self.logits, logits)
        judged = self._judge(found, logits, written)
        if self.answers and written.truncated_logits is not None:
            # The truncated change gives other answers than the run, so check its own answers.
            self.answers = answers_of(model, self.tokenizer, self.prompts)
        del model
        check = ExportCheck(
            examples=len(logits),
            answers=found.answers,
            same_answers=found.same,
            largest_logit=found.largest,
            difference=found.difference,
            judged=judged,
        )
        if self.answers and written.loading is not None:
            assert judged.tolerance is not None
            alone = self._answers_alone(written.loading, judged.tolerance)
            check = check.changed(answers_alone=alone)
        if written.on_plain_base is not None:
            # Reported without a limit, since rounding does not explain what quantization changed.
            plain = compare(self.logits, logits_of(_load_back(written.on_plain_base), self.batches))
            on_plain = OnPlainBase(difference=plain.difference, same_answers=plain.same)
            check = check.changed(on_plain_base=on_plain)
        return check

    def _judge(self, found: Agreement, logits: list[Tensor], written: Written) -> Judged:
        """Refuse logits that differ from the run's, or from those of the truncated change."""
        truncated = written.truncated_logits
        judged = found if truncated is None else compare(truncated, logits)
        tolerance = self.options.tolerance
        if tolerance is None:
            tolerance = tolerance_for(self.dtype, judged.largest, rounded=written.rounded)
        fix = "a larger --tolerance"
        if self.form.whole and self.dtype != torch.float32:
            fix = f"--to lora, which keeps the change apart from half-precision weights; or {fix}"
        check_agreement(judged, tolerance, fix=fix)
        return Judged(
            against="the run" if truncated is None else "the cut change",
            difference=judged.difference,
            tolerance=tolerance,
        )

    def _answers_alone(self, loading: Loading, tolerance: float) -> AnswersAlone:
        """Compare the answers that transformers gives with the folder in another process."""
        count = f"{len(self.answers)} answers, by transformers in another process"
        self.observer.phase("check", count)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # The other process needs the memory.
        pad = self.tokenizer.pad_token_id
        found = check_answers(self.answers, loading, self.device, pad, tolerance)
        return AnswersAlone.model_validate(found)


def _evaluations(files: RunFiles) -> list[EvaluationRecord]:
    """Return what `evaluate` has written into the run's folder since the model was trained."""
    trained = files.tensors.stat().st_mtime
    places = sorted({*files.folder.glob(EVALUATION), *files.folder.glob(f"*/{EVALUATION}")})
    found = [load(EvaluationRecord, p) for p in places if p.stat().st_mtime >= trained]
    return [each for each in found if Path(each.model).name == files.folder.name]


def _labels(model: Any) -> dict[int, str]:
    """Return a classifier's labels by number; empty for a language model."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if auto_class(plain) != CLASSIFIER:
        return {}
    return {int(number): str(name) for number, name in model.config.id2label.items()}


def _origin(trained: TrainedModel, files: RunFiles) -> dict[str, Any]:
    """Return the entries of export.json about the run."""
    section, model = trained.recipe.model, trained.setup.model
    method = trained.settings.model_dump(mode="json")
    packages = ["sparsegrad", "torch", "transformers", "peft"]
    if section.quantization is not None:
        packages.append("bitsandbytes")
    return {
        "run": str(files.folder),
        "source": files.source,
        "model": ExportedModel(
            name=section.name,
            auto_class=auto_class(model),
            architecture=type(model).__name__,
            dtype=section.dtype,
            quantization=section.quantization,
            fingerprint=trained.setup.fingerprint,
        ),
        "method": ExportedMethod.model_validate(method),
        "scope": trained.recipe.scope,
        **_label_entries(model),
        "versions": package_versions(packages),
    }


def _label_entries(model: Any) -> dict[str, Any]:
    """Return the entries of export.json about labels, which a PEFT folder itself does not hold."""
    labels, config = _labels(model), model.config
    if not labels:
        return {}
    found = {"labels": [labels[number] for number in sorted(labels)]}
    found["problem_type"] = config.problem_type
    if (threshold := getattr(config, THRESHOLD, None)) is not None:
        found["label_threshold"] = threshold
    return found


def _load_back(load: Callable[[], nn.Module]) -> nn.Module:
    """Load the written folder; turn any error of a library into a SparsegradError."""
    try:
        return load()
    except SparsegradError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SparsegradError(f"the written files cannot be loaded: {first_line(error)}") from error
