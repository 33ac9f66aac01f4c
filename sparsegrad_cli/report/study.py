"""Build the report of a study: scores, costs and runs, task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import quote

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.study import CellEntry, ResultRow, StudyRecord
from sparsegrad_cli.report import captions, study_charts
from sparsegrad_cli.report.budget import budget_flags, budget_table
from sparsegrad_cli.report.conclusions import check_lines, pairs_table, parity_table, verdict_lines
from sparsegrad_cli.report.document import (
    Block,
    Checks,
    Column,
    Document,
    Drawing,
    Figure,
    Labelled,
    Paragraph,
    Section,
    SideBySide,
    Table,
    Verdict,
)
from sparsegrad_cli.report.headline import study_headline
from sparsegrad_cli.report.next_steps import study_next
from sparsegrad_cli.report.provenance import provenance
from sparsegrad_cli.report.scores import (
    METHOD,
    difference_words,
    few_seeds,
    note_words,
    overview_table,
    published_table,
    reference_of,
    rows_of,
    score_table,
    summary_table,
    tasks_of,
)
from sparsegrad_cli.report.tuning import trials_table, tuning_lines, tuning_progress, tuning_table
from sparsegrad_cli.report.units import (
    NOT_RECORDED,
    format_count,
    format_fixed,
    format_mib,
    format_number,
    format_score,
    format_share,
    status_words,
    words,
)

Chart = Callable[[StudyRecord, str], Drawing | None]
Words = Callable[[StudyRecord, str], str]

REFRESH_S = 30

_TESTS = (
    " compared over all seeds and tasks, and the p-values are corrected for the number of pairs. "
    "Runs are paired by task and seed."
)
_TUNING = (
    "Before the runs of the study, every method had the same number of trials on each task, over "
    "an equally wide space around a center of its own, "
)
_SHARED = "on seeds that are not reported. The runs use the best settings of their method and task."
_OWN = (
    "for each seed by itself. Held-out training rows chose the best trial, which is the reported "
    "run of its seed."
)
_FAIR = (
    "Recipes are compared before the first run: methods may differ only in their own settings, "
    "their calibration, their learning rate, and what the study allows. During training, the "
    "inputs of every run are hashed: the model, the initial head, the data, the batches in their "
    "order, and the precision."
)


@dataclass(frozen=True)
class ChartPlan:
    """One figure of a task: its title, how it is drawn, its caption, and its result in words."""

    title: str
    chart: Chart
    caption: str | Words
    alt: Words


SCORES = (
    ChartPlan(
        "Score of every seed",
        study_charts.score_dots,
        "One dot per seed; the bar is the mean with its standard deviation. A difference smaller "
        "than the spread may be chance.",
        captions.scores_alt,
    ),
)
CURVES = (
    ChartPlan(
        "Validation score over training",
        study_charts.learning_curves,
        captions.curves_caption,
        captions.curves_alt,
    ),
)
MEMORY = (
    ChartPlan(
        "Score against memory",
        study_charts.score_against_memory,
        "Further left is better, and so is higher (lower for losses and perplexities): a better "
        "score with fewer bytes beyond the weights. Bars are 95 % confidence intervals of the mean "
        "over seeds; with few seeds they are wide and leave the figure. One seed has none.",
        captions.memory_score_alt,
    ),
    ChartPlan(
        "Best score that fits a memory budget",
        study_charts.score_under_budget,
        "A curve starts at the smallest budget that fits and steps up where a larger one allows a "
        "better score. The budget has to hold calibration, too. Dashed: a single seed, too few for "
        "a ranking.",
        captions.budget_alt,
    ),
    ChartPlan(
        "Peak of the training step",
        study_charts.memory_by_method,
        "By category, on the longest examples of the task.",
        captions.method_memory_alt,
    ),
    ChartPlan(
        "Peak of every phase",
        study_charts.memory_by_phase,
        "By category, including calibration. First seed.",
        captions.phase_memory_alt,
    ),
    ChartPlan(
        "Speed",
        study_charts.speed_bars,
        "Optimizer steps per second, everything in a step included; the bar is the range over "
        "seeds. Speeds compare only if nothing else ran on the machine and runs did not run side "
        "by side.",
        captions.speed_alt,
    ),
)
CHANGED = (
    ChartPlan(
        "Where parameters changed",
        study_charts.changed_maps,
        "Where the parameters of the middle target lie that changed in any step: the share of "
        "each block of the matrix that the method selects from, either a core sorted by singular "
        "value or the weight itself. Methods that change every parameter have no map. First seed.",
        captions.changed_maps_alt,
    ),
    ChartPlan(
        "Changed share of every target module",
        study_charts.changed_by_target,
        "Parameters that changed in any step, as a share of each target's weights; for LoRA, the "
        "parameters of A and B. Logarithmic colors. First seed.",
        captions.changed_targets_alt,
    ),
)


class ChartCache:
    """A cache of the previous page's charts, reused for tasks without newly finished runs."""

    def __init__(self) -> None:
        self._kept: dict[object, Drawing | None] = {}
        self._used: dict[object, Drawing | None] = {}

    def draw(self, chart: Chart, study: StudyRecord, task: str) -> Drawing | None:
        """Return the chart of a task."""
        runs = [cell for cell in study.cells if cell.task == task and cell.status == "done"]
        state = tuple((c.method, c.seed, c.run.finished if c.run else None) for c in runs)
        key = (chart, task, state)
        if key not in self._kept:
            self._kept[key] = chart(study, task)
        self._used[key] = self._kept[key]
        return self._used[key]

    def finish_page(self) -> None:
        """Forget the charts that the last page did not use."""
        self._kept, self._used = self._used, {}


def study_document(
    study: StudyRecord, answers: Sequence[SideBySide] = (), charts: ChartCache | None = None
) -> Document:
    """Return the whole report of a study.

    Args:
        study: the record.
        answers: the answers of its models to the same questions.
        charts: the charts of the previous page.
    """
    charts = charts or ChartCache()
    tasks = tasks_of(study)
    pairs, tuned = pairs_table(study), tuning_table(study)
    alone = len(answers) == 1

    def figures(plans: Sequence[ChartPlan]) -> list[Block | None]:
        return [_figure(plan, study, task, charts) for plan in plans for task in tasks]

    return Document(
        title=study.name or "unnamed",
        status=study.status,
        subtitle=_progress(study),
        finished=study.finished or "",
        refresh_s=REFRESH_S if study.status == "running" else 0,
        lead=[
            Verdict(study_headline(study), verdict_lines(study)),
            overview_table(study) if len(tasks) > 1 else _scores(study, tasks),
        ],
        sections=[
            Section(
                "Scores and learning curves",
                [
                    *(map(_table_of(study), tasks) if len(tasks) > 1 else ()),
                    *figures((*SCORES, *CURVES)),
                ],
            ),
            Section("Unfinished runs", [unfinished_table(study)], in_paper=False),
            Section(
                "Memory and speed",
                [
                    *(cost_table(study, task) for task in tasks),
                    *figures(MEMORY),
                    *(calibration_costs(study, task) for task in tasks),
                ],
            ),
            Section("Budget", [budget_table(study.budget)]),
            Section("Differences", [Paragraph(_test_words(study)), pairs] if pairs else []),
            Section(
                "Is the comparison fair?",
                [Paragraph(_FAIR), Checks(check_lines(study)), parity_table(study)],
            ),
            study_next(study),
            *(Section("Answers" if alone else f"Answers: {each.task}", [each]) for each in answers),
            Section(
                "Tuning",
                [Paragraph(_tuning_words(study)), tuned, trials_table(study)] if tuned else [],
            ),
            Section("Published results", [published_table(study)]),
            Section("Changed parameters", figures(CHANGED), in_paper=False),
            Section("All runs", [runs_table(study)], in_paper=False),
            Section("Provenance", [provenance(study)], in_paper=False),
        ],
    )


def _scores(study: StudyRecord, tasks: Sequence[str]) -> Block | None:
    return _table_of(study)(tasks[0]) if tasks else None


def _table_of(study: StudyRecord) -> Callable[[str], Block]:
    """Return a function from a task to its scores."""
    return lambda task: (
        score_table(study, task) or Paragraph(f"{task}: no results recorded.", dim=True)
    )


def _figure(plan: ChartPlan, study: StudyRecord, task: str, charts: ChartCache) -> Figure:
    several = len(tasks_of(study)) > 1
    caption = plan.caption if isinstance(plan.caption, str) else plan.caption(study, task)
    return Figure(
        f"{plan.title}: {task}" if several else plan.title,
        partial(charts.draw, plan.chart, study, task),
        caption,
        plan.alt(study, task),
    )


def study_screen(study: StudyRecord) -> Document:
    """Return a study for the terminal: one row per method and task, tests and checks."""
    lead: list[Block | None] = []
    for task in tasks_of(study):
        lead += _task_on_screen(study, task)
    budget, tuned = budget_table(study.budget), tuning_table(study)
    lead += [overview_table(study), published_table(study)]
    lead.append(replace(budget, notes=budget_flags(study.budget)) if budget else None)
    lead.append(replace(tuned, notes=tuning_lines(study)).without("space") if tuned else None)
    lead += [Verdict(study_headline(study), verdict_lines(study)), Checks(check_lines(study))]
    return Document(title=study.name or "unnamed", status=study.status, lead=lead)


def _progress(study: StudyRecord) -> str:
    """Return ``12 of 24 runs done; running: glue/rte lora seed 42. Scores are multiplied ...``."""
    done = sum(cell.status == "done" for cell in study.cells)
    running = [
        f"{cell.task} {cell.method} seed {cell.seed}"
        for cell in study.cells
        if cell.status == "running"
    ]
    trials = tuning_progress(study)
    first = f"{trials}, " if trials else ""
    now = f"; running: {', '.join(running)}" if running else ""
    return f"{first}{done} of {len(study.cells)} runs done{now}. Scores are multiplied by 100."


def _task_on_screen(study: StudyRecord, task: str) -> list[Block]:
    """Return a table that fits a terminal, with differences and remarks below it."""
    rows, table = rows_of(study, task), summary_table(study, task)
    if table is None:
        return [Paragraph(f"{task}: no results recorded", dim=True)]
    differences = [f"{row.method} {text}" for row in rows if (text := difference_words(row))]
    blocks: list[Block] = [table]
    if differences:
        remark = few_seeds(rows)
        shown = ", ".join(differences) + (f"; {remark}" if remark else "")
        blocks.append(Labelled(f"against {reference_of(rows)}", shown))
    notes = [Labelled(row.method, note) for row in rows if (note := note_words(row))]
    return [*blocks, *notes, Paragraph("")]


# --- costs


def cost_table(study: StudyRecord, task: str) -> Table | None:
    """Return the trainable and changed parameters, and the bytes of a step and an adapter."""
    rows = rows_of(study, task)
    columns: list[Column[ResultRow]] = [
        METHOD,
        Column("trainable at once", lambda row: format_count(row.trainable)),
        Column("of them in targets", lambda row: format_count(row.trainable_targets)),
        Column("ever changed in targets", lambda row: format_count(_rounded(row.touched_targets))),
        Column("optimizer state, MiB", lambda row: format_mib(row.optimizer_state_bytes)),
        Column("saved activations, MiB", lambda row: format_mib(row.saved_activation_bytes)),
        Column("peak, MiB", lambda row: format_mib(row.peak_bytes)),
        Column("beyond the weights, MiB", lambda row: format_mib(row.beyond_weights_bytes)),
        Column("adapter, MiB", lambda row: format_mib(row.adapter_bytes)),
        Column("steps/s", _speed),
    ]
    caption = f"{task}: costs; bytes are the maximum over seeds, all else the mean"
    return Table.of(rows, columns, caption) if rows else None


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _speed(row: ResultRow) -> str:
    """Return steps per second, ± half the distance from the fastest seed to the slowest."""
    if row.steps_per_s is None or row.steps_per_s_iqr is None:
        return format_number(row.steps_per_s)
    return f"{row.steps_per_s:.3g} ± {row.steps_per_s_iqr / 2:.2g}"


def calibration_costs(study: StudyRecord, task: str) -> Table | None:
    """Return the cost of calibration; None if the methods of the task do not calibrate."""
    rows = rows_of(study, task)
    if not any(row.calibrate_s for row in rows):
        return None

    def share(row: ResultRow) -> str:
        total = (row.calibrate_s or 0.0) + (row.train_s or 0.0)
        known = row.calibrate_s is not None and row.train_s is not None and total > 0
        return format_share((row.calibrate_s or 0.0) / total) if known else NOT_RECORDED

    def peak(row: ResultRow) -> str:
        return format_mib(row.calibrate_peak_bytes if row.calibrate_s else 0)

    def tokens(row: ResultRow) -> str:
        return format_count(_rounded(row.calibrate_tokens) if row.calibrate_s else 0)

    columns: list[Column[ResultRow]] = [
        METHOD,
        Column("seconds", lambda row: format_fixed(row.calibrate_s, 1)),
        Column("of the run", share),
        Column("tokens", tokens),
        Column("peak, MiB", peak),
        Column("peak with training, MiB", lambda row: format_mib(row.peak_charged_bytes)),
        Column("runs on one basis", lambda row: format_count(row.basis_uses)),
        Column("seconds per run", lambda row: format_fixed(row.calibrate_s_per_use, 1)),
    ]
    note = (
        "each run is charged the whole cost of its basis; the last column divides it among the "
        "runs of this study that share the basis"
    )
    caption = f"{task}: calibration, charged to the method; means over seeds"
    return Table.of(rows, columns, caption, [note])


# --- runs

_RUN: list[Column[CellEntry]] = [
    Column("task", lambda cell: cell.task, words=True),
    Column("method", lambda cell: cell.method, words=True),
    Column("seed", lambda cell: str(cell.seed), words=True),
    Column("status", lambda cell: status_words(cell.status), words=True),
]


def unfinished_table(study: StudyRecord) -> Table | None:
    """Return the runs that are not done, with their reasons."""
    cells = [cell for cell in study.cells if cell.status != "done"]

    def reason(cell: CellEntry) -> str:
        if cell.error:
            return cell.error.what
        return "" if cell.status in ("pending", "running") else NOT_RECORDED

    columns: list[Column[CellEntry]] = [
        *_RUN,
        Column("reason", reason, words=True),
        Column("what to do", lambda c: (c.error.fix if c.error else "") or "", words=True),
    ]
    return Table.of(cells, columns, "Runs that are not done") if cells else None


def _test_words(study: StudyRecord) -> str:
    row = study.tests.row if study.tests else None
    return (f"{row} and every other method are" if row else "Every two methods are") + _TESTS


def _tuning_words(study: StudyRecord) -> str:
    own = study.tuning is not None and study.tuning.own_seeds
    return _TUNING + (_OWN if own else _SHARED)


def runs_table(study: StudyRecord) -> Table | None:
    """Return every run: its score, its speed, its folder with a link to its report."""

    def score(cell: CellEntry) -> str:
        run = cell.run
        found = run.metrics.reported if run and run.metrics else None
        metric = run.task.metric if run and run.task else None
        return format_score(found.score if found else None, scale_of(metric))

    def speed(cell: CellEntry) -> str:
        return format_number(cell.run.time.steps_per_s if cell.run and cell.run.time else None)

    columns: list[Column[CellEntry]] = [
        *_RUN,
        Column("folder", lambda cell: words(cell.run_dir), words=True),
        Column("score", score),
        Column("steps/s", speed),
    ]
    if not study.cells:
        return None
    table = Table.of(study.cells, columns, "Runs", folded="Every run, with its report")
    return replace(table, links=_report_links(study.cells, column=len(_RUN)))


def _report_links(cells: Sequence[CellEntry], column: int) -> dict[tuple[int, int], str]:
    """Return the links to the reports of finished runs, relative to the study's folder."""
    return {
        (row, column): f"./{quote(cell.run_dir)}/report.html"
        for row, cell in enumerate(cells)
        if cell.run_dir and cell.status == "done"
    }
