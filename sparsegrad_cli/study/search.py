"""What to try next in tuning, what to stop, and the journal of trials. Optuna does all three.

The journal holds trials that have ended, and nothing else. A proposal is a function of the trials
before it, so an interrupted trial is proposed again. Optuna takes a second to import, so this
module imports it when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.study.search_space import Dimension, first_point

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FIRST = 7  # trials on fixed points: with one dimension, every eighth of the span
SEED = 0
COMPARED = 3  # finished trials before any is stopped, and at any evaluation it is compared at
NEXT_SEED = 10**9  # the steps of a trial's second seed are counted from here
SAMPLER = f"Halton's points for the first {FIRST} trials, then TPE with a fixed seed"
PRUNER = (
    f"median of {COMPARED} or more finished trials at the same evaluation, not in the first third "
    "of a run"
)
_BEGINNING = b'{"op_code"'  # of every line of Optuna's journal
_ENTRY, _SPENT, _ABOUT = "trial", "spent", "about"  # keys of Optuna's user attributes


# --- what to try, and what to stop


def load_optuna() -> Any:
    """Import Optuna and silence its log."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(space: Sequence[Dimension], told: Sequence[FrozenTrial], name: str) -> dict[str, Any]:
    """Return the settings of the next trial: a function of the space, name and earlier trials.

    Args:
        space: the dimensions.
        told: all trials that have ended, in order.
        name: of the series; seeds the sampler together with the trial's number.
    """
    number = len(told)
    if number < FIRST:
        return first_point(space, number)
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
    """Decides after every evaluation of a trial whether to stop it; the same rule for all methods.

    Optuna's median pruner: stop if the best score so far is below the median of the scores that
    finished trials had at the same evaluation.

    Args:
        told: all trials of the series that have ended.

    Attributes:
        seen: step of an evaluation to its score, more is better.
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
        """Return whether to stop after this evaluation; the last of a trial stops nothing.

        Args:
            step: optimizer step of the evaluation.
            value: its score, more is better.
        """
        if step in self.seen:  # told before an interruption
            return False
        self.seen[step] = value
        self._trial.report(value, step)
        return step < self._last and bool(self._trial.should_prune())


def _in_memory(told: Sequence[FrozenTrial], **by: Any) -> Study:
    study = load_optuna().create_study(direction="maximize", **by)
    study.add_trials(told)
    return study


# --- what came out


def ended_trial(
    space: Sequence[Dimension], entry: Mapping[str, Any], seen: Mapping[int, float]
) -> FrozenTrial:
    """Return a trial that has ended as Optuna keeps it.

    A failed trial counts among the worst, as a pruned one: a rate that diverges says something.

    Args:
        space: the dimensions.
        entry: as compare.json has it.
        seen: step of an evaluation to its score, more is better.
    """
    done = entry["status"] == "done"
    trial = load_optuna().trial
    return trial.create_trial(
        state=trial.TrialState.COMPLETE if done else trial.TrialState.PRUNED,
        value=goodness(entry["score"], entry["metric"]) if done else None,
        params=dict(entry["settings"]),
        distributions={dimension.key: _distribution(dimension) for dimension in space},
        intermediate_values=dict(seen),
        user_attrs={_ENTRY: dict(entry)},
    )


def entry_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return what compare.json says of a trial."""
    return {**trial.user_attrs[_ENTRY], "number": trial.number}


def goodness(score: float, metric: str | None) -> float:
    """Return a score, its sign turned if less is better."""
    return -score if scale_of(metric).lower_is_better else score


def best_trial(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the finished trial with the best score; of equal ones the lowest loss, then the first.

    None if no trial is done.
    """

    def rank(trial: Mapping[str, Any]) -> tuple[float, float, int]:
        loss = float("inf") if trial["loss"] is None else trial["loss"]
        return -goodness(trial["score"], trial["metric"]), loss, trial["number"]

    return min((trial for trial in trials if trial["status"] == "done"), key=rank, default=None)


def edges(space: Sequence[Dimension], trials: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return where the best trial is the outermost that was tried: the optimum may lie beyond.

    Returns:
        ``{"key": ..., "end": "lowest" or "highest"}`` of each such range.
    """
    best = best_trial(trials)
    if best is None:
        return []
    found = []
    for dimension in space:
        if dimension.choices is not None:
            continue
        tried = [trial["settings"][dimension.key] for trial in trials]
        for end, outermost in (("lowest", min(tried)), ("highest", max(tried))):
            if best["settings"][dimension.key] == outermost:
                found.append({"key": dimension.key, "end": end})
    return found


class TrialStore:
    """tuning.journal: Optuna's journal storage of all series, which ``optuna-dashboard`` reads.

    Args:
        path: the file; made if missing. The caller holds the study's folder.

    Raises:
        FileFormatError: it is not such a journal, or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._studies: dict[str, Study] = {}
        self._optuna = load_optuna()
        with self._known_errors():
            # A kill may leave Optuna's own lock, and part of a line. The study's folder is ours.
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
            _check_journal(path)
            journal = self._optuna.storages.journal
            file = str(path.absolute())
            backend = journal.JournalFileBackend(file, journal.JournalFileOpenLock(file))
            self._storage = journal.JournalStorage(backend)

    def open(self, name: str, about: Mapping[str, Any], *, make: bool = True) -> bool:
        """Return whether a series is there now.

        Args:
            name: its name.
            about: what its trials have in common.
            make: make it if missing.

        Raises:
            UsageError: its trials have something else in common.
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
        """Return the first trials of a series in order, at most as many as every method gets."""
        with self._known_errors():
            return list(self._studies[name].get_trials(deepcopy=False)[:most])

    def add(self, name: str, trial: FrozenTrial) -> None:
        """Keep a trial that has ended."""
        with self._known_errors():
            self._studies[name].add_trial(trial)

    def spent(self, name: str, run: str) -> float:
        """Return the seconds that interrupted attempts at a run have taken."""
        with self._known_errors():
            return float(self._studies[name].user_attrs.get(f"{_SPENT} {run}", 0.0))

    def spend(self, name: str, run: str, seconds: float) -> None:
        """Note the seconds that all interrupted attempts at a run have taken."""
        with self._known_errors():
            self._studies[name].set_user_attr(f"{_SPENT} {run}", seconds)

    def forget(self, name: str, about: Mapping[str, Any]) -> None:
        """Begin a series afresh."""
        with self._known_errors():
            self._optuna.delete_study(study_name=name, storage=self._storage)
        self.open(name, about)

    @contextmanager
    def _known_errors(self) -> Iterator[None]:
        """One thread at a time; a damaged or unwritable journal raises FileFormatError."""
        with self._lock:
            try:
                yield
            except (self._optuna.exceptions.OptunaError, OSError, ValueError, TypeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
            except (KeyError, IndexError, AttributeError, AssertionError) as error:
                reason = f"a line is not Optuna's ({type(error).__name__}: {error})"
            else:
                return
            raise FileFormatError(
                f"{self._path.name} cannot be read or written: {reason}",
                where=str(self._path),
                fix="bring it back from a copy, or begin again with --overwrite",
            )


def _check_journal(path: Path) -> None:
    """Remove part of a line at the end of a journal, which a kill in the middle of writing leaves.

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
