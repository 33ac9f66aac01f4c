"""Optuna's part in tuning: what to try next, what to stop, and tuning.db.

The database holds trials that have ended, and nothing else: one that was interrupted leaves nothing
in it, and since a proposal is a function of the trials before it, the same is proposed again.
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
from sparsegrad_cli.study.space import Dimension, first_point, goodness

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FIRST = 7  # trials that are no proposals of TPE: with one dimension, every eighth of the span
SEED = 0
COMPARED = 3  # finished trials before any is stopped, and at any evaluation it is compared at
NEXT_SEED = 10**9  # the steps of a trial's second seed are counted from here
SAMPLER = f"Halton's points for the first {FIRST} trials, then TPE with a fixed seed"
PRUNER = (
    f"median of {COMPARED} or more finished trials at the same evaluation, not in the first third "
    "of a run"
)
BUSY_S = 60  # to wait for another process that writes
_ATTRIBUTE, _SPENT = "trial", "spent"


def quiet_optuna() -> Any:
    """Optuna, which takes a second to import, without its log."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(space: Sequence[Dimension], told: Sequence[FrozenTrial], name: str) -> dict[str, Any]:
    """The settings of the next trial: a function of the space, the name and the trials before.

    Args:
        space: the dimensions.
        told: all trials that have ended, in order.
        name: of the series; seeds the sampler together with the trial's number.
    """
    number = len(told)
    if number < FIRST:
        return first_point(space, number)
    seed = int(hashlib.sha256(f"{SEED} {name} {number}".encode()).hexdigest()[:8], 16)
    sampler = quiet_optuna().samplers.TPESampler(n_startup_trials=FIRST, seed=seed)
    study = _rehearsal(told, sampler=sampler)
    asked = study.ask(_distributions(space)).params
    return {dimension.key: dimension.rounded(asked[dimension.key]) for dimension in space}


class Referee:
    """Says of a trial, evaluation by evaluation, whether it is worth going on.

    Optuna's median pruner: stop if the best score so far is below the median of the scores that
    finished trials had at the same evaluation. The same rule for all methods.

    Args:
        told: all trials of the series that have ended.
    """

    def __init__(self, told: Sequence[FrozenTrial]) -> None:
        optuna = quiet_optuna()
        done = [trial for trial in told if trial.state == optuna.trial.TrialState.COMPLETE]
        steps = {step for trial in done for step in trial.intermediate_values}
        self._last = max(steps, default=0)
        one_run = max((step for step in steps if step < NEXT_SEED), default=0)
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=COMPARED, n_warmup_steps=one_run // 3, n_min_trials=COMPARED
        )
        self._trial = _rehearsal(told, pruner=pruner).ask()
        self.seen: dict[int, float] = {}

    def stops(self, step: int, value: float) -> bool:
        """Whether to stop after this evaluation; the last of a trial stops nothing.

        Args:
            step: optimizer step of the evaluation.
            value: its score, more is better.
        """
        if step in self.seen:  # told before an interruption
            return False
        self.seen[step] = value
        self._trial.report(value, step)
        return step < self._last and bool(self._trial.should_prune())


def _rehearsal(told: Sequence[FrozenTrial], **by: Any) -> Study:
    """The series so far, in memory."""
    study = quiet_optuna().create_study(direction="maximize", **by)
    study.add_trials(told)
    return study


def _distributions(space: Sequence[Dimension]) -> dict[str, Any]:
    kinds = quiet_optuna().distributions
    found: dict[str, Any] = {}
    for d in space:
        if d.choices is not None:
            found[d.key] = kinds.CategoricalDistribution(d.choices)
        else:
            found[d.key] = kinds.FloatDistribution(d.low, d.high, log=d.log)
    return found


def ended_trial(
    space: Sequence[Dimension], entry: Mapping[str, Any], seen: Mapping[int, float]
) -> FrozenTrial:
    """A trial that has ended, as Optuna keeps it.

    One that failed counts among the worst, as a stopped one: a rate that diverges says something.

    Args:
        space: the dimensions.
        entry: as compare.json has it.
        seen: step of an evaluation to its score, more is better.
    """
    done = entry["status"] == "done"
    trial = quiet_optuna().trial
    return trial.create_trial(
        state=trial.TrialState.COMPLETE if done else trial.TrialState.PRUNED,
        value=goodness(entry["score"], entry["metric"]) if done else None,
        params=dict(entry["settings"]),
        distributions=_distributions(space),
        intermediate_values=dict(seen),
        user_attrs={_ATTRIBUTE: dict(entry)},
    )


def entry_of(trial: FrozenTrial) -> dict[str, Any]:
    """What compare.json says of a trial."""
    return {**trial.user_attrs[_ATTRIBUTE], "number": trial.number}


class TuningStore:
    """tuning.db, an Optuna storage that ``optuna-dashboard`` reads, too.

    Args:
        path: the file; made by the first series that is opened.

    Raises:
        FileFormatError: it is no such database, or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._studies: dict[str, Study] = {}
        self._optuna = quiet_optuna()
        with self._known_errors():
            self._storage = self._optuna.storages.RDBStorage(
                f"sqlite:///{path.resolve()}",
                engine_kwargs={"connect_args": {"timeout": BUSY_S}},
            )

    def open(self, name: str, about: Mapping[str, Any], *, make: bool = True) -> bool:
        """Whether a series is there now.

        Args:
            name: its name.
            about: what its trials have in common; the same as ever.
            make: make it if missing.

        Raises:
            UsageError: its trials were made with something else in common.
        """
        said = json.dumps(about, sort_keys=True)
        with self._known_errors():
            if not make and name not in self._optuna.get_all_study_names(self._storage):
                return False
            study = self._optuna.create_study(
                storage=self._storage, study_name=name, direction="maximize", load_if_exists=True
            )
            if make and "about" not in study.user_attrs:
                study.set_user_attr("about", said)
            there = study.user_attrs.get("about", said)
        if there != said:
            raise UsageError(
                f"{self._path} holds trials of {name} in another space or with other settings",
                where="tune",
                fix="--overwrite, or another --output-dir",
            )
        self._studies[name] = study
        return True

    def ended(self, name: str, most: int) -> list[FrozenTrial]:
        """The first trials of a series, in order: at most as many as every method gets."""
        with self._known_errors():
            return list(self._studies[name].get_trials(deepcopy=False)[:most])

    def add(self, name: str, trial: FrozenTrial) -> None:
        """Keep a trial that has ended."""
        with self._known_errors():
            self._studies[name].add_trial(trial)

    def spent(self, name: str, run: str) -> float:
        """Seconds that interrupted attempts at a run have taken."""
        with self._known_errors():
            return float(self._studies[name].user_attrs.get(f"{_SPENT} {run}", 0.0))

    def spend(self, name: str, run: str, seconds: float) -> None:
        """Note down what an interrupted attempt has taken, with those before it."""
        with self._known_errors():
            self._studies[name].set_user_attr(f"{_SPENT} {run}", seconds)

    def forget(self, name: str, about: Mapping[str, Any]) -> None:
        """A series begins afresh."""
        with self._known_errors():
            self._optuna.delete_study(study_name=name, storage=self._storage)
        self.open(name, about)

    def close(self) -> None:
        """Let go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    @contextmanager
    def _known_errors(self) -> Iterator[None]:
        """One at a time, and what SQL says as an error of ours."""
        from sqlalchemy.exc import SQLAlchemyError

        with self._lock:
            try:
                yield
            except (SQLAlchemyError, self._optuna.exceptions.OptunaError, RuntimeError) as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise FileFormatError(
                    f"{self._path.name} cannot be read or written: {reason}",
                    where=str(self._path),
                    fix="bring it back from a copy, or begin anew with --overwrite",
                ) from error
