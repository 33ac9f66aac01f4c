"""Propose, prune and store the trials of tuning with Optuna.

The journal holds only trials that have ended. A proposal is a function of the trials before it, so
an interrupted trial is proposed again. Importing Optuna takes a second, so this module imports it
only when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.study import Edge, Trial
from sparsegrad_cli.study.search_space import Dimension, first_point

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FIRST = 7  # trials at fixed points: in one dimension, every eighth of the span
SEED = 0
COMPARED = 3  # finished trials needed before pruning, overall and at the compared evaluation
NEXT_SEED = 10**9  # the steps of a trial's second seed are counted from this number
SAMPLER = f"Halton's points for the first {FIRST} trials, then TPE with a fixed seed"
PRUNER = (
    f"median of {COMPARED} or more finished trials at the same evaluation, not in the first third "
    "of a run"
)
_BEGINNING = b'{"op_code"'  # start of every line of Optuna's journal
_RECORD, _SPENT, _ABOUT = "trial", "spent", "about"  # keys of Optuna's user attributes


# --- proposals and pruning


def load_optuna() -> Any:
    """Import Optuna and silence its log."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(
    space: Sequence[Dimension], told: Sequence[FrozenTrial], name: str, shift: float = 0.0
) -> dict[str, Any]:
    """Return the settings of the next trial, which depend only on the arguments.

    Args:
        space: the dimensions.
        told: all trials that have ended, in order.
        name: the name of the series, which seeds the sampler together with the trial's number.
        shift: of the first points (:func:`first_point`).
    """
    number = len(told)
    if number < FIRST:
        return first_point(space, number, shift)
    seed = int(hashlib.sha256(f"{SEED} {name} {number}".encode()).hexdigest()[:8], 16)
    sampler = load_optuna().samplers.TPESampler(n_startup_trials=FIRST, seed=seed)
    study = _in_memory(told, sampler=sampler)
    asked = study.ask({dimension.key: _distribution(dimension) for dimension in space}).params
    return {dimension.key: dimension.rounded(asked[dimension.key]) for dimension in space}


def _distribution(dimension: Dimension) -> Any:
    kinds = load_optuna().distributions
    if dimension.choices is not None:
        return kinds.CategoricalDistribution(dimension.choices)
    return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


class Pruner:
    """Decide after every evaluation of a trial whether to stop it, by one rule for all methods.

    This is Optuna's median pruner: it stops a trial if its best score so far is below the median of
    the scores that finished trials had at the same evaluation.

    Args:
        told: all trials of the series that have ended.

    Attributes:
        seen: step of an evaluation to its score; higher is better.
    """

    def __init__(self, told: Sequence[FrozenTrial]) -> None:
        optuna = load_optuna()
        done = [trial for trial in told if trial.state == optuna.trial.TrialState.COMPLETE]
        steps = {step for trial in done for step in trial.intermediate_values}
        self._last = max(steps, default=0)
        one_run = max((step for step in steps if step < NEXT_SEED), default=0)
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=COMPARED, n_warmup_steps=one_run // 3, n_min_trials=COMPARED
        )
        self._trial = _in_memory(told, pruner=pruner).ask()
        self.seen: dict[int, float] = {}

    def stops(self, step: int, value: float) -> bool:
        """Return whether to stop after this evaluation; never after the last one of a trial.

        Args:
            step: optimizer step of the evaluation.
            value: its score; higher is better.
        """
        if step in self.seen:  # reported before an interruption
            return False
        self.seen[step] = value
        self._trial.report(value, step)
        return step < self._last and bool(self._trial.should_prune())


def _in_memory(told: Sequence[FrozenTrial], **by: Any) -> Study:
    study = load_optuna().create_study(direction="maximize", **by)
    study.add_trials(told)
    return study


# --- ended trials


def ended_trial(
    space: Sequence[Dimension], record: Trial, seen: Mapping[int, float]
) -> FrozenTrial:
    """Return an ended trial in Optuna's form.

    A failed trial counts among the worst, like a pruned one, because a learning rate that diverges
    is information too.

    Args:
        space: the dimensions.
        record: the trial's record.
        seen: step of an evaluation to its score; higher is better.
    """
    done = record.status == "done" and record.score is not None
    trial = load_optuna().trial
    return trial.create_trial(
        state=trial.TrialState.COMPLETE if done else trial.TrialState.PRUNED,
        value=goodness(record.score or 0.0, record.metric) if done else None,
        params=dict(record.settings),
        distributions={dimension.key: _distribution(dimension) for dimension in space},
        intermediate_values=dict(seen),
        user_attrs={_RECORD: record.to_json()},
    )


def record_of(trial: FrozenTrial) -> Trial:
    """Return the record of a trial that :func:`ended_trial` made."""
    return Trial.model_validate(trial.user_attrs[_RECORD])


def goodness(score: float, metric: str | None) -> float:
    """Return a score, negated if lower is better."""
    return -score if scale_of(metric).lower_is_better else score


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the finished trial with the best score; ties go to the lowest loss, then the first.

    Return None if no trial has finished.
    """

    def rank(trial: Trial) -> tuple[float, float, int]:
        loss = math.inf if trial.loss is None else trial.loss
        score = -math.inf if trial.score is None else goodness(trial.score, trial.metric)
        return -score, loss, trial.number

    return min((trial for trial in trials if trial.status == "done"), key=rank, default=None)


def edges(space: Sequence[Dimension], trials: Sequence[Trial]) -> list[Edge]:
    """Return the ranges in which the best trial has the lowest or highest value that was tried.

    The optimum may lie beyond that value.
    """
    best = best_trial(trials)
    if best is None:
        return []
    found = []
    for dimension in space:
        if dimension.choices is not None:
            continue
        tried = [trial.settings[dimension.key] for trial in trials]
        for end, outermost in (("lowest", min(tried)), ("highest", max(tried))):
            if best.settings[dimension.key] == outermost:
                found.append(Edge(key=dimension.key, end=end))
    return found


class TrialStore:
    """tuning.journal: Optuna's journal storage of all series, which ``optuna-dashboard`` reads.

    Args:
        path: the file, which is made if missing. The caller must have locked the study's folder.

    Raises:
        FileFormatError: the file is not such a journal, or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._studies: dict[str, Study] = {}
        self._optuna = load_optuna()
        with self._known_errors():
            # A killed process may leave Optuna's own lock and part of a line. Both can be removed,
            # because this process has locked the study's folder.
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
            _check_journal(path)
            journal = self._optuna.storages.journal
            file = str(path.absolute())
            backend = journal.JournalFileBackend(file, journal.JournalFileOpenLock(file))
            self._storage = journal.JournalStorage(backend)

    def open(self, name: str, about: Mapping[str, Any], *, make: bool = True) -> bool:
        """Open a series, and return whether it exists.

        Args:
            name: the name of the series.
            about: what its trials have in common.
            make: whether to make the series if it is missing.

        Raises:
            UsageError: the stored trials have another space or other settings.
        """
        said = json.dumps(about, sort_keys=True)
        with self._known_errors():
            if not make and name not in self._optuna.get_all_study_names(self._storage):
                return False
            study = self._optuna.create_study(
                storage=self._storage, study_name=name, direction="maximize", load_if_exists=True
            )
            if make and _ABOUT not in study.user_attrs:
                study.set_user_attr(_ABOUT, said)
            there = study.user_attrs.get(_ABOUT, said)
        if there != said:
            raise UsageError(
                f"{self._path} holds trials of {name} in another space or with other settings",
                where="tune",
                fix="--overwrite, or another --output-dir",
            )
        self._studies[name] = study
        return True

    def ended(self, name: str, most: int) -> list[FrozenTrial]:
        """Return the first ``most`` trials of a series, in order."""
        with self._known_errors():
            return list(self._studies[name].get_trials(deepcopy=False)[:most])

    def add(self, name: str, trial: FrozenTrial) -> None:
        """Store a trial that has ended."""
        with self._known_errors():
            self._studies[name].add_trial(trial)

    def spent(self, name: str, run: str) -> float:
        """Return the seconds that interrupted attempts at a run took."""
        with self._known_errors():
            return float(self._studies[name].user_attrs.get(f"{_SPENT} {run}", 0.0))

    def spend(self, name: str, run: str, seconds: float) -> None:
        """Store the seconds that all interrupted attempts at a run took."""
        with self._known_errors():
            self._studies[name].set_user_attr(f"{_SPENT} {run}", seconds)

    def forget(self, name: str, about: Mapping[str, Any]) -> None:
        """Delete the trials of a series and make it again."""
        with self._known_errors():
            self._optuna.delete_study(study_name=name, storage=self._storage)
        self.open(name, about)

    @contextmanager
    def _known_errors(self) -> Iterator[None]:
        """Admit one thread at a time, and map errors of the journal to FileFormatError."""
        with self._lock:
            try:
                yield
            except (self._optuna.exceptions.OptunaError, OSError, ValueError, TypeError) as error:
                reason = first_line(error)
            except (KeyError, IndexError, AttributeError, AssertionError) as error:
                reason = f"a line is not Optuna's ({type(error).__name__}: {error})"
            else:
                return
            raise FileFormatError(
                f"{self._path.name} cannot be read or written: {reason}",
                where=str(self._path),
                fix="restore it from a copy, or name another --output-dir",
            )


def _check_journal(path: Path) -> None:
    """Remove an incomplete last line, which a process killed while writing leaves in a journal.

    Raises:
        ValueError: the file is not a journal; it is left unchanged.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
            raise ValueError("expected a journal of Optuna, got something else")
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
