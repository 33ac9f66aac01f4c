"""Say the result of a report in one sentence: which score, compared with what, how certain."""

from __future__ import annotations

import math
from collections import Counter
from statistics import fmean
from typing import NamedTuple

from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.records.export import ExportRecord
from sparsegrad_cli.records.metric_direction import Scale, common_metric, scale_of
from sparsegrad_cli.records.run import Evaluation, MetricsBlock, RunRecord, SupportShares
from sparsegrad_cli.records.study import PairTest, PairTestsBlock, StudyRecord
from sparsegrad_cli.report.scores import methods_of, rows_of, scale_of_rows, tasks_of
from sparsegrad_cli.report.units import (
    counted,
    format_count,
    format_interval,
    format_number,
    format_percent,
    format_score,
    listed,
    status_words,
)

MOST_SEEDS = 10_000  # The record's `seeds_needed` goes no further.
_MOST_NAMED = 8  # methods in a sentence; the table has them all


# --- comparisons


def study_headline(study: StudyRecord) -> str:
    """Return ``sparsegrad 75.0, lora 65.8; 2 seeds: inconclusive, 7 would decide``."""
    ranking = _ranking(study)
    if not ranking:
        done = sum(cell.status == "done" for cell in study.cells)
        return f"No scores yet; {done} of {len(study.cells)} runs done"
    parts = [ranking.words, _certainty(study, ranking)]
    lost = Counter(c.status for c in study.cells if c.status in ("failed", "out_of_memory"))
    parts += [f"{counted(count, 'run')} {status_words(status)}" for status, count in lost.items()]
    open_runs = any(c.status in ("pending", "running", "interrupted") for c in study.cells)
    return ("So far: " if open_runs else "") + "; ".join(parts)


class _Ranking(NamedTuple):
    """The methods of a study, best first, and their scores in words."""

    methods: list[str]
    words: str


def _ranking(study: StudyRecord) -> _Ranking | None:
    """Return the methods by score: on the task, or by the mean over tasks if there is one."""
    tasks = tasks_of(study)
    scored = [task for task in tasks if any(r.score_mean is not None for r in rows_of(study, task))]
    if not scored:
        return None
    if len(tasks) == 1:
        scale = scale_of_rows(rows_of(study, tasks[0]))
        return _ranked(_means(study, tasks[0]), scale, "")
    metrics = [next((r.metric for r in rows_of(study, t) if r.metric), None) for t in tasks]
    metric = common_metric(metrics)
    by_task = [_means(study, task) for task in tasks]
    complete = [m for m in methods_of(study) if all(m in means for means in by_task)]
    if metric is not None and complete:
        means = {method: fmean(means[method] for means in by_task) for method in complete}
        return _ranked(means, scale_of(metric), f"Mean of {len(tasks)} tasks: ")
    parts = [
        _ranked(_means(study, task), scale_of_rows(rows_of(study, task)), f"{task}: ")
        for task in scored
    ]
    return _Ranking(parts[0].methods, "; ".join(part.words for part in parts))


def _means(study: StudyRecord, task: str) -> dict[str, float]:
    return {r.method: r.score_mean for r in rows_of(study, task) if r.score_mean is not None}


def _ranked(means: dict[str, float], scale: Scale, lead: str) -> _Ranking:
    order = sorted(means, key=lambda method: means[method], reverse=not scale.lower_is_better)
    shown = order if len(order) <= _MOST_NAMED else order[: _MOST_NAMED - 1]
    words = ", ".join(f"{method} {format_score(means[method], scale)}" for method in shown)
    words += f" and {len(order) - len(shown)} more" if len(shown) < len(order) else ""
    kind = f" ({scale.words}, lower is better)" if scale.lower_is_better else ""
    return _Ranking(order, f"{lead}{words}{kind}")


def _certainty(study: StudyRecord, ranking: _Ranking) -> str:
    """Return ``2 seeds: inconclusive, 7 would decide``."""
    done = [row.seeds_done for row in study.rows if row.score_mean is not None]
    least, most = min(done, default=0), max(done, default=0)
    seeds = counted(most, "seed") if least == most else f"{least} to {most} seeds"
    if len(ranking.methods) < 2:
        return f"{seeds}: no second method to compare with"
    tests = study.tests
    if tests is None:
        return f"{seeds}: not tested"
    if not tests.pairs:
        pairs = math.comb(len(ranking.methods), 2)
        fewest = _fewest(tests, pairs, len(tasks_of(study)))
        return f"{seeds}: not tested, {tests.reason or fewest}"
    beaten: dict[str, list[str]] = {}
    for pair in tests.pairs:
        if pair.better:
            beaten.setdefault(pair.better, []).append(pair.b if pair.better == pair.a else pair.a)
    said = [f"{method} is better than {listed(others)}" for method, others in beaten.items()]
    said += [f"{pair.a} is non-inferior to {pair.b}" for pair in tests.pairs if pair.not_inferior]
    first, second = ranking.methods[:2]
    leading = next((p for p in tests.pairs if {p.a, p.b} == {first, second}), None)
    if leading is None and tests.row in (None, first, second):
        said.append(f"{first} and {second} not tested, they have fewer than two seeds in common")
    elif leading is not None and not leading.better and leading.margin is None:
        which = f" between {first} and {second}" if len(ranking.methods) > 2 else ""
        said.append(f"inconclusive{which}{_needed(leading)}")
    return f"{seeds}: {', '.join(said) or 'inconclusive'}"


def _fewest(tests: PairTestsBlock, pairs: int, tasks: int) -> str:
    """Return how many seeds a test needs at least: 2^(1 - n) has to be small enough."""
    if not tests.level:
        return "two seeds of a task are the fewest for a test"
    needed = math.ceil((1 + math.log2(max(pairs, 1) / tests.level)) / max(tasks, 1))
    return f"{max(needed, 2)} are the fewest that could decide"


def _needed(pair: PairTest) -> str:
    needed = pair.seeds_needed
    if needed is None and pair.examples_share:
        return ", and more seeds would not decide, only more test rows"
    if needed is None:
        zero = pair.p == 1.0  # Records of earlier versions have no number, whatever the difference.
        return ", and no number of seeds would decide: the mean difference is zero" if zero else ""
    if needed >= MOST_SEEDS:
        return f", {format_count(MOST_SEEDS)} or more would be needed"
    return f", {format_count(needed)} would decide"


# --- runs


def best_so_far(metrics: MetricsBlock | None) -> Evaluation | None:
    """Return the evaluation of the kept model; of an unfinished run, the best one until then."""
    if metrics is None:
        return None
    if metrics.best is not None:
        return metrics.best
    there = [each for each in metrics.history if each.score is not None]
    trained = [each for each in there if each.step > 0] or there
    if not trained:
        return metrics.initial
    best = scale_of(trained[0].metric).best([each.score or 0.0 for each in trained])
    return next(each for each in trained if each.score == best)


def run_headline(run: RunRecord, scale: Scale) -> str:
    """Return the best score of a run, what it compares with, and how an unfinished run ended.

    Args:
        run: the record.
        scale: of its scores.
    """
    best, end = best_so_far(run.metrics), _end_words(run)
    if best is None or best.score is None:
        return f"{end}: no evaluation yet" if end else ""
    name = run.method.name if run.method else "score"
    parts = [f"{name} {format_score(best.score, scale)}"]
    test = run.metrics.test if run.metrics else None
    if test is not None and test.score is not None:
        held_out = f"on held-out training rows {format_score(best.score, scale)}"
        parts = [f"{name} {format_score(test.score, scale)} on the test set", held_out]
    before = run.metrics.initial if run.metrics else None
    if before and before.score is not None and before.step != best.step:
        parts.append(f"before training {format_score(before.score, scale)}")
    baseline = run.task.baseline if run.task else None
    if baseline is not None:
        parts.append(f"{baseline[0]} {format_score(baseline[1], scale)}")
    total = f" of {run.time.steps:,}" if run.time and run.time.steps else ""
    found = f"{', '.join(parts)}; {scale.label} at step {best.step:,}{total}"
    if best.step and misses_baseline(run, scale):
        found += ": no better than the same answer for every row"
    return f"{end}; best so far: {found}" if end else found


def misses_baseline(run: RunRecord, scale: Scale) -> bool:
    """Return whether the score is no better than that of the same answer for every row.

    The baseline is measured on the test set, if there is one.
    """
    best, baseline = best_so_far(run.metrics), run.task.baseline if run.task else None
    if run.task and run.task.test_examples:
        best = run.metrics.test if run.metrics else None
    if best is None or best.score is None or baseline is None:
        return False
    return best.score >= baseline[1] if scale.lower_is_better else best.score <= baseline[1]


def _end_words(run: RunRecord) -> str:
    """Return ``Failed after step 40`` for a run that is not done."""
    if run.status == "done":
        return ""
    metrics = run.metrics or MetricsBlock()
    steps = [each.step for each in metrics.history] + [each.step for each in metrics.train]
    after = f" after step {max(steps):,}" if steps else ""
    if run.status == "running":
        return f"Still running{after}"
    return f"{status_words(run.status).capitalize()}{after}"


# --- calibrations


class EnergyVerdict(NamedTuple):
    """Shares of the energy of held-out gradients, as means over layer kinds, from 0 to 1.

    Attributes:
        trained: in the parameters that train; None if no support was compared.
        basis: in the best parameters in the basis, chosen in hindsight.
        original: in the best parameters without a basis.
    """

    trained: float | None
    basis: float
    original: float

    @property
    def basis_holds(self) -> bool:
        """Whether the basis concentrates gradients that calibration never saw."""
        return self.basis > self.original

    @property
    def support_holds(self) -> bool:
        """Whether the trained parameters hold more energy than any choice without a basis."""
        return self.trained is None or self.trained > self.original


def energy_verdict(run: RunRecord) -> EnergyVerdict | None:
    """Return the shares on which the verdict on a basis rests; None if they were not measured."""
    energy = run.calibration.energy if run.calibration else None
    if energy is None:
        return None
    compared = energy.compared.mean_by_kind if energy.compared else {}
    if compared:
        found = [_share(compared, key) for key in ("support", "full_basis", "original")]
    else:
        own = [
            (shares.layer_basis if shares.layer_basis is not None else shares.kind_basis)
            for shares in energy.mean_by_kind.values()
        ]
        known = [share for share in own if share is not None]
        plain = [s.original for s in energy.mean_by_kind.values() if s.original is not None]
        found = [None, *(fmean(each) if each else None for each in (known, plain))]
    trained, basis, original = found
    return None if basis is None or original is None else EnergyVerdict(trained, basis, original)


def _share(compared: dict[str, SupportShares], key: str) -> float | None:
    values = [v for shares in compared.values() if (v := getattr(shares, key)) is not None]
    return fmean(values) if values else None


def calibration_headline(run: RunRecord) -> str:
    """Return whether the basis holds the energy of held-out gradients, compared with none."""
    if run.status != "done":
        return _end_words(run)
    found = energy_verdict(run)
    if found is None:
        return "The basis was computed; how well it holds held-out gradients was not measured"
    if not found.basis_holds:
        verdict = "The basis does not hold"
    elif found.support_holds:
        verdict = "The basis holds"
    else:
        verdict = "The basis holds, but the support that trains does not"
    figures = f"in the basis {format_percent(found.basis)} % of the energy of held-out gradients"
    figures += f", without a basis {format_percent(found.original)} %"
    if found.trained is not None:
        figures += f", in the trained support {format_percent(found.trained)} %"
    return f"{verdict}: {figures}"


# --- evaluations and exports


def evaluation_headline(record: EvaluationRecord) -> str:
    """Return the first metric with its interval, the rows, and the weakest class if any is weak."""
    if not record.metrics:
        return ""
    name, metric = next(iter(record.metrics.items()))
    scale = scale_of(name)
    words = f"{scale.label} {format_score(metric.value, scale)}"
    if metric.interval:
        words += f" (95 % interval {format_interval(scale.clip(metric.interval), scale)})"
    words += f" on {counted(record.rows, 'row')}"
    found = [each for each in record.classes if each.recall is not None and each.rows]
    weakest = min(found, key=lambda each: each.recall or 0.0, default=None)
    if weakest is not None and len(found) > 1 and weakest.recall != 1:
        words += f"; weakest class: {weakest.name}, {format_percent(weakest.recall)} % found"
    return words


def export_headline(record: ExportRecord) -> str:
    """Return whether the exported model agrees with the run, and on how many rows."""
    check = record.check
    if check is None or check.difference is None:
        return "The export was not compared with the run"
    parts = [f"logits differ by at most {format_number(check.difference)}"]
    if check.same_answers is not None and check.answers:
        same = f"{format_count(check.same_answers)} of {format_count(check.answers)}"
        parts.append(f"{same} answers are the same")
    if check.examples is not None:
        parts.append(f"{counted(check.examples, 'validation row')} compared")
    judged = check.judged
    if judged is None:
        return "; ".join(parts)
    cut = judged.against == "the cut change"
    agreed = _agreed(judged.difference, judged.tolerance)
    if cut:
        verdict = f"the export is the truncated change{'' if agreed else ', but not exactly'}"
    else:
        verdict = "the export agrees with the run" if agreed else "the export differs from the run"
    return f"{'; '.join(parts)}: {verdict}"


def _agreed(difference: float | None, tolerance: float | None) -> bool:
    return difference is not None and tolerance is not None and difference <= tolerance
