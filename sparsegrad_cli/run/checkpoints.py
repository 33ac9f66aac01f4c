"""A run's checkpoints: sealed when written, judged when read, dropped when there are too many.

Which one is the newest is said by its step, never by a clock. No torch at import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DiskError, FileFormatError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import discard
from sparsegrad_cli.run.checkpoint_manifest import check_ours, damage, seal

TRAINER_STATE = "trainer_state.json"
_PREFIX = "checkpoint-"
_NAMED = re.compile(_PREFIX + "([0-9]{1,18})")


def checkpoints(run_dir: Path) -> list[Path]:
    """All folders named as checkpoints are, whole or not, by step."""
    found = [path for path in run_dir.glob(f"{_PREFIX}*") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(folder: Path) -> int | None:
    """N of checkpoint-N; None for another folder."""
    named = _NAMED.fullmatch(folder.name)
    return int(named[1]) if named and folder.is_dir() else None


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next((path for path in reversed(checkpoints(run_dir)) if damage(path) is None), None)


def trainer_state(folder: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint.

    Raises:
        FileFormatError: missing or damaged.
    """
    path = folder / TRAINER_STATE
    try:
        content = plain_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise FileFormatError("holds no state of a trainer", where=str(path))
    return content


def best_of(folder: Path) -> Path | None:
    """The best checkpoint when this one was written, in the folder where both are now."""
    best = trainer_state(folder).get("best_model_checkpoint")
    name = Path(best).name if isinstance(best, str) else ""
    return folder.with_name(name) if _NAMED.fullmatch(name) else None


def evaluation_due(folder: Path) -> bool:
    """Whether a checkpoint was written when the evaluation of its step was stopped."""
    try:
        control = trainer_state(folder)["stateful_callbacks"]["TrainerControl"]["args"]
        return bool(control["should_evaluate"])
    except (FileFormatError, KeyError, TypeError):  # the trainer says what is wrong with it
        return False


class Shelf:
    """The checkpoints of one run, which nobody else is writing to.

    Args:
        run_dir: where they stand.
        recipe: digest of the run's recipe.
        earlier: digests of what that was before the run was extended.
        limit: how many are kept; the newest and the best are kept in any case.
        keep_best: the run ends with its best checkpoint, so that one is worth nothing without it.

    Attributes:
        newest: the one that was found or written last, whole.
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: str,
        *,
        limit: int | None,
        keep_best: bool = False,
        earlier: Collection[str] = (),
    ) -> None:
        self.run_dir, self._recipe, self._earlier = run_dir, recipe, tuple(earlier)
        self._limit, self._keep_best = limit, keep_best
        self._useless: set[Path] = set()
        self.newest: Path | None = None

    def find(self, note: Callable[[str], None]) -> Path | None:
        """The newest checkpoint from which the run can go on, after clearing up behind a kill.

        Args:
            note: told of every one that is passed over, and why.

        Raises:
            FileFormatError: one is of another version.
            UsageError: one is of another recipe.
        """
        self._clear_up()
        for folder in reversed(checkpoints(self.run_dir)):
            wrong = damage(folder)
            if wrong is None:
                for text in check_ours(folder, (self._recipe, *self._earlier)):
                    note(text)
                wrong = self._without_its_best(folder)
            if wrong is None:
                if self._useless:
                    note(f"{folder.name} is used, the newest whole one")
                self.newest = folder
                return folder
            note(f"{folder.name} is damaged: {wrong}")
            self._useless.add(folder)
        if self._useless:
            note("no whole checkpoint is left: training begins anew")
        return None

    def _without_its_best(self, folder: Path) -> str | None:
        best = best_of(folder) if self._keep_best else None
        if best is None or best == folder:
            return None
        wrong = damage(best)
        return f"its best checkpoint, {best.name}: {wrong}" if wrong else None

    def _clear_up(self) -> None:
        from sparsegrad_cli.io.atomic import BEFORE, PARTIAL, REMOVED, put_back

        for before in self.run_dir.glob(f"{_PREFIX}*{BEFORE}"):
            put_back(before.with_name(before.name.removesuffix(BEFORE)))
        for ending in (PARTIAL, BEFORE, REMOVED):
            for left in self.run_dir.glob(f"{_PREFIX}*{ending}"):
                discard(left)

    def write(self, step: int, fill: Callable[[Path], None], best: Path | None) -> Path:
        """Write checkpoint-``step``, read it back, and only then drop what is over the limit.

        Raises:
            DiskError: it could not be written, or is not what was written; all others stand.
        """
        from sparsegrad_cli.io.atomic import write_folder

        folder = self.place(step)

        def fill_and_seal(partial: Path) -> None:
            fill(partial)
            seal(partial, self._recipe)

        write_folder(
            folder,
            fill_and_seal,
            fix="free some space, then continue with --resume: the previous checkpoint is whole",
        )
        wrong = damage(folder)
        if wrong is not None:
            raise DiskError(
                f"{folder.name} was written and reads back otherwise: {wrong}",
                where=str(folder),
                fix="look at the disk, then go on with --resume: the checkpoint before is whole",
            )
        self._useless.discard(folder)
        self.newest = folder
        self._drop(folder, best)
        return folder

    def place(self, step: int) -> Path:
        """Where checkpoint-``step`` stands, or would."""
        return self.run_dir / f"{_PREFIX}{step}"

    def _drop(self, newest: Path, best: Path | None) -> None:
        from sparsegrad_cli.io.atomic import remove_folder

        # Beyond the newest lies only what damage made this run go back behind.
        until = step_of(newest) or 0
        there = [path for path in checkpoints(self.run_dir) if (step_of(path) or 0) <= until]
        for folder in [path for path in there if path in self._useless]:
            remove_folder(folder)
            there.remove(folder)
        kept = {newest, best} & set(there)
        spare = [path for path in there if path not in kept]
        over = len(there) - max(self._limit, len(kept)) if self._limit is not None else 0
        for folder in spare[: max(0, over)]:
            remove_folder(folder)

    def finish(self, best: Path | None) -> None:
        """The run is over: of a limit of one, the best one is what stays."""
        from sparsegrad_cli.io.atomic import remove_folder

        useless = {path for path in self._useless if path.is_dir()}
        if self._limit == 1 and best is not None and best.is_dir():
            useless |= set(checkpoints(self.run_dir)) - {best}
        for folder in useless:
            remove_folder(folder)
