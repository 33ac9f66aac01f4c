"""Data sets from the Hugging Face hub or its local cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.glue import examples_from_table
from sparsegrad_cli.data.parquet_files import converted
from sparsegrad_cli.data.table import Columns, Table
from sparsegrad_cli.errors import DownloadError, UsageError
from sparsegrad_cli.hub_access import why_unreachable
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.tasks import GLUE_TASKS, RawTask

if TYPE_CHECKING:
    from datasets import Dataset

_GLUE = "nyu-mll/glue"


def load_hub_glue(task: str) -> RawTask:
    """Read one GLUE task from the hub's nyu-mll/glue, or from the cache where it lies already.

    Args:
        task: short name: ``cola``, ``rte``, ...

    Raises:
        DownloadError: it is neither cached nor reachable; says how to go local.
    """
    spec = GLUE_TASKS[task]
    fix = (
        f"point task.path at a local folder that holds {task}'s train and dev files (the original "
        "TSV files, or Parquet, CSV or JSON lines), or connect once to fill the cache"
    )
    splits = ("train", *spec.eval_splits)
    loaded, notes = load_hub_splits(_GLUE, splits, config=task, called=spec.name, fix=fix)
    parts = {}
    for split, data in loaded.items():
        table = hub_table(data, f"{_GLUE} {task} {split}")
        parts[split] = examples_from_table(spec, table, split, notes)
    train = parts.pop("train")
    return RawTask(spec, train, parts, notes)


def hub_table(data: Dataset, source: str) -> Table:
    """Return a split as a table, whose columns are converted when they are used."""
    from datasets import ClassLabel

    plain = data.with_format("arrow")
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if isinstance(feature, ClassLabel)
    }

    def column(name: str) -> list[Any]:
        return converted(plain.select_columns([name])[:].column(0), name, source)

    readers = {name: partial(column, name) for name in data.column_names}
    return Table(Columns(readers), source, count=len(data), class_names=names, typed=True)


def load_hub_splits(
    hub_id: str,
    splits: Sequence[str] | None,
    *,
    called: str,
    fix: str,
    config: str | None = None,
) -> tuple[dict[str, Dataset], list[str]]:
    """Splits of a data set by name, and notes for the user.

    Args:
        hub_id: ``owner/name``.
        splits: their names; None takes all there are.
        called: what the user calls the data set.
        fix: how to do without the hub.
        config: the data set's configuration, where it has several.

    Raises:
        UsageError: it has no split of such a name.
        DownloadError: it is neither cached nor reachable.
    """
    import datasets

    unreachable = why_unreachable("dataset", hub_id)
    try:
        with _cache_only(unreachable is not None):
            found = datasets.load_dataset(hub_id, config)
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error).strip()
        reason = unreachable or (text.splitlines()[0] if text else type(error).__name__)
        raise DownloadError(
            f"{called} ({hub_id} on the Hugging Face hub) is not in the local cache and "
            f"cannot be fetched: {reason}",
            where="task.name",
            fix=fix,
        ) from error
    for split in splits or ():
        if split not in found:
            raise UsageError(
                f"{hub_id} has no split {split!r}", where="task", fix=suggest(split, list(found))
            )
    notes = []
    if unreachable:
        notes.append(f"the hub cannot be reached ({unreachable}): {called} is the cached copy")
    return {split: found[split] for split in splits or found}, notes


@contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """While open and wanted, ``datasets`` looks into its cache and nowhere else."""
    import datasets

    if not wanted:
        yield
        return
    before, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # what it would warn of is a note of the task
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(verbosity)
