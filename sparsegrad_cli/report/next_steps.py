"""Say what to do after a run, a comparison, a calibration or an evaluation, with commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from sparsegrad_cli.methods.registry import BASELINE, DEFAULT_METHOD
from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.records.export import ExportRecord
from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import CellEntry, StudyRecord
from sparsegrad_cli.report.captions import loss_points, method_trends
from sparsegrad_cli.report.document import Bullets, Command, Commands, Section
from sparsegrad_cli.report.headline import MOST_SEEDS, energy_verdict, misses_baseline
from sparsegrad_cli.report.run_charts import score_points
from sparsegrad_cli.report.scores import scale_of_rows, tasks_of
from sparsegrad_cli.report.trends import trend_of
from sparsegrad_cli.report.units import format_score, listed

_ENDED = ("failed", "out_of_memory", "interrupted")


def command(*words: str) -> str:
    """Return a command line of sparsegrad, with words quoted where a shell needs it."""
    return shlex.join(("sparsegrad", *words))


# --- a run


def run_next(run: RunRecord, scale: Scale) -> Section:
    """Return what to do after a training run."""
    folder = run.output_dir or run.name
    advice = _run_advice(run, scale)
    commands = _run_commands(run, folder, scale) if folder else []
    return Section("What next", [Bullets(advice), Commands(commands)], in_paper=False)


def _run_advice(run: RunRecord, scale: Scale) -> list[str]:
    if run.status in _ENDED and run.error is not None:
        return [run.error.fix] if run.error.fix else []
    advice = []
    training, validation = (
        trend_of(points, lower_is_better=True) for points in loss_points(run.metrics)
    )
    if curve_improves(run, scale):
        advice.append("The score still improves at the end: train longer.")
    if validation and validation.direction == "worse" and training:
        advice.append(
            "The validation loss rises at the end: train fewer steps, or set "
            "train.early_stopping_patience."
        )
    if misses_baseline(run, scale):
        advice.append(
            "The score is no better than that of the same answer for every row: try a higher "
            "train.learning_rate, more steps, or check the labels."
        )
    if not advice:
        advice.append("Compare with another method before you rely on this one.")
    return advice


def curve_improves(run: RunRecord, scale: Scale) -> bool:
    """Return whether the validation score still improves at the end."""
    curve = trend_of(score_points(run.metrics), lower_is_better=scale.lower_is_better)
    return curve is not None and curve.direction == "improves"


def _run_commands(run: RunRecord, folder: str, scale: Scale) -> list[Command]:
    again = f"{folder}-again"
    if run.status != "done":
        return [
            Command(command("train", folder, "--resume"), "continue the run"),
            Command(command("train", folder, f"output_dir={again}"), "train it again"),
        ]
    longer = []
    if curve_improves(run, scale) and run.time and run.time.steps:
        steps = f"train.max_steps={2 * run.time.steps}"
        longer.append(Command(command("train", folder, "--resume", steps), "train it longer"))
    return [
        *longer,
        Command(command("train", folder, f"output_dir={again}"), "reproduce the run"),
        *use_commands(run, folder),
        Command(
            command("compare", folder, "--methods", _rivals(run), "--seeds", "5"),
            "compare with other methods",
        ),
    ]


def use_commands(run: RunRecord, folder: str) -> list[Command]:
    """Return how to use a finished training run: here, and through transformers alone.

    Args:
        run: The record of the run.
        folder: The folder of the run.
    """
    chat = run.task is not None and run.task.kind == "chat"
    use = (
        Command(command("generate", folder), "talk to the model")
        if chat
        else Command(command("predict", folder, "a text"), "label a text or a file")
    )
    kind = "text-generation" if chat else "text-classification"
    merged = json.dumps(str(PurePosixPath(folder, "export-merged")), ensure_ascii=False)
    return [
        use,
        Command(command("export", folder, "--to", "merged"), "export a Hugging Face model"),
        Command(f'pipeline("{kind}", model={merged})', "load the export, in Python"),
    ]


def _rivals(run: RunRecord) -> str:
    name = run.method.name if run.method else DEFAULT_METHOD.name
    return ",".join(dict.fromkeys((name, BASELINE, DEFAULT_METHOD.name)))


# --- a calibration


def calibration_next(run: RunRecord) -> Section:
    """Return what to do with a basis."""
    folder, found = run.output_dir or run.name or "", energy_verdict(run)
    if run.status != "done":
        advice = [run.error.fix] if run.error and run.error.fix else []
    elif found is None or (found.basis_holds and found.support_holds):
        advice = ["Train in this basis."]
    elif found.basis_holds:
        advice = [
            "The basis is good, the support is not: calibrate with more steps "
            "(calibration.steps), raise method.rank, or let the support follow the gradients "
            "(method.support=dynamic)."
        ]
    else:
        advice = [
            "Calibrate with more steps (calibration.steps) or one basis per layer "
            "(calibration.basis_per=layer). If the basis still does not hold, compare with "
            "method=meprop, which selects parameters without a basis."
        ]
    commands = []
    if folder and run.status == "done":
        basis = str(PurePosixPath(folder, "basis.safetensors"))
        settings = (f"calibration.basis={basis}", f"output_dir={folder}-train")
        commands = [
            Command(command("train", folder, *settings), "train in this basis"),
            Command(
                command("calibrate", folder, f"output_dir={folder}-again"), "calibrate it again"
            ),
        ]
    return Section("What next", [Bullets(advice), Commands(commands)], in_paper=False)


# --- a comparison


def study_next(study: StudyRecord) -> Section:
    """Return what to do after a comparison."""
    advice = [*_failures(study), *_more_seeds(study), *_longer(study)]
    return Section("What next", [Bullets(advice), Commands(_study_commands(study))], in_paper=False)


def _failures(study: StudyRecord) -> list[str]:
    lost = [cell for cell in study.cells if cell.status in _ENDED]
    if not lost or study.status == "running":
        return []
    fixes = dict.fromkeys(cell.error.fix for cell in lost if cell.error and cell.error.fix)
    return [
        f"{len(lost)} of {len(study.cells)} runs did not finish. The same command tries them again "
        "and leaves finished runs unchanged.",
        *fixes,
    ]


def _more_seeds(study: StudyRecord) -> list[str]:
    pairs = study.tests.pairs if study.tests else []
    needed = [
        pair for pair in pairs if pair.seeds_needed is not None and pair.seeds_needed < MOST_SEEDS
    ]
    if not needed:
        return []
    each = [f"{pair.a} and {pair.b} {pair.seeds_needed:,}" for pair in needed[:6]]
    return [
        f"Seeds that would decide, if the differences stay as they are: {', '.join(each)}. The "
        "same command with more --seeds keeps the finished runs."
    ]


def _longer(study: StudyRecord) -> list[str]:
    rising = {
        method
        for task in tasks_of(study)
        for method, trend in method_trends(study, task).items()
        if trend is not None and trend.direction == "improves"
    }
    if not rising:
        return []
    return [
        f"Still improving at the end: {listed(sorted(rising))}. A comparison of longer runs may "
        "have another result."
    ]


def _study_commands(study: StudyRecord) -> list[Command]:
    commands = []
    if study.command:
        again = study.command.removeprefix("sparsegrad ")
        commands.append(Command(f"sparsegrad {again}", "repeat or continue the comparison"))
    best = _best_run(study)
    if best is not None and best.run is not None and best.run.output_dir:
        folder = best.run.output_dir
        about = f"{best.method}, seed {best.seed}"
        commands += [
            Command(command("export", folder, "--to", "merged"), f"export the best run ({about})"),
            Command(command("report", folder), "show its report"),
        ]
    return commands


def _best_run(study: StudyRecord) -> CellEntry | None:
    """Return the run with the best score on the first task that has one."""
    for task in tasks_of(study):
        rows = [row for row in study.rows if row.task == task]
        scored = [
            (cell.run.metrics.best.score, cell)
            for cell in study.cells
            if cell.task == task
            and cell.run
            and cell.run.metrics
            and cell.run.metrics.best
            and cell.run.metrics.best.score is not None
        ]
        if scored:
            best = scale_of_rows(rows).best([score for score, _ in scored])
            return next(cell for score, cell in scored if score == best)
    return None


def study_of_runs(runs: Sequence[RunRecord]) -> list[Command]:
    """Return the command that compares the methods of some runs over several seeds."""
    first = runs[0].output_dir or runs[0].name
    methods = dict.fromkeys(run.method.name for run in runs if run.method)
    if not first or len(methods) < 2:
        return []
    line = command("compare", first, "--methods", ",".join(methods), "--seeds", "5")
    return [Command(line, "compare the methods over several seeds")]


# --- evaluations and exports


def evaluation_next(record: EvaluationRecord) -> Section:
    """Return what to do after an evaluation."""
    advice = []
    found = [each for each in record.classes if each.f1 is not None and each.rows]
    if len(found) > 1:
        worst = min(found, key=lambda each: each.f1 or 0.0)
        advice.append(
            f"The weakest class is {worst.name} (F1 {format_score(worst.f1)}): read its wrong rows "
            "above; the labels may be wrong, or the class may need more examples."
        )
    if record.cut:
        advice.append(
            "Some rows are longer than the model reads: a larger task.max_length may help."
        )
    again = Command(
        command("evaluate", record.model, record.file, "--resamples", str(record.resamples)),
        "evaluate again",
    )
    label = Command(command("predict", record.model, record.file, "-o", "labelled.csv"), "label it")
    return Section("What next", [Bullets(advice), Commands([again, label])], in_paper=False)


def export_next(record: ExportRecord) -> Section:
    """Return how to load an export, and how to make it again."""
    commands = []
    if record.load:
        commands.append(Command(record.load, "load it in Python"))
    if record.pipeline:
        commands.append(Command(record.pipeline, "make a pipeline of transformers"))
    if record.run:
        commands.append(Command(command("export", record.run, "--to", record.to), "export again"))
    return Section("What next", [Commands(commands)], in_paper=False)
