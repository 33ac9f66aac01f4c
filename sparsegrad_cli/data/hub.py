"""Load data sets from the Hugging Face hub or from its local cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.parquet_files import to_python
from sparsegrad_cli.data.tables import Columns, Table
from sparsegrad_cli.errors import DownloadError, UsageError
from sparsegrad_cli.io.hub_access import why_unreachable
from sparsegrad_cli.io.suggest import suggest

if TYPE_CHECKING:
    from datasets import Dataset


def hub_table(data: Dataset, source: str) -> Table:
    """Return a split as a table whose columns are converted on first use."""
    from datasets import ClassLabel

    plain = data.with_format("arrow")
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if isinstance(feature, ClassLabel)
    }

    def column(name: str) -> list[Any]:
        return to_python(plain.select_columns([name])[:].column(0), name, source)

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
    """Return splits of a data set by name, and notes for the user.

    Args:
        hub_id: ``owner/name``.
        splits: names of the splits; None takes all.
        called: the name of the data set in messages.
        fix: how to do without the hub, for the error.
        config: configuration of a data set that has several.

    Raises:
        UsageError: the data set has no split of such a name.
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
    """Make ``datasets`` use nothing but its cache inside the block, if ``wanted``."""
    import datasets

    if not wanted:
        yield
        return
    before, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # the task has a note about it
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(verbosity)
