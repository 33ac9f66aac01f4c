"""GLUE from the Hugging Face hub or its local cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsegrad_cli.data.files import Table
from sparsegrad_cli.data.glue import examples_from_table
from sparsegrad_cli.data.spec import GLUE_TASKS, RawTask
from sparsegrad_cli.errors import DownloadError

_HUB_ID = "nyu-mll/glue"


def load_hub_glue(task: str) -> RawTask:
    """Read one GLUE task from the hub's nyu-mll/glue, or from the cache where it lies already.

    Args:
        task: short name: ``cola``, ``rte``, ...

    Raises:
        DownloadError: it is neither cached nor reachable; says how to go local.
    """
    import datasets

    spec = GLUE_TASKS[task]
    notes: list[str] = []
    unreachable = _why_unreachable()
    try:
        with _cache_only(unreachable is not None):
            loaded = [
                datasets.load_dataset(_HUB_ID, task, split=split)
                for split in ("train", *spec.eval_splits)
            ]
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error).strip()
        reason = unreachable or (text.splitlines()[0] if text else type(error).__name__)
        raise DownloadError(
            f"{spec.name} ({_HUB_ID} on the Hugging Face hub) is not in the local cache and "
            f"cannot be fetched: {reason}",
            where="task.name",
            fix=f"point task.path at a local folder that holds {task}'s train and dev files (the "
            "original TSV files, or Parquet, CSV or JSON lines), or connect once to fill the cache",
        ) from error
    if unreachable:
        notes.append(f"the hub cannot be reached ({unreachable}): {spec.name} is the cached copy")
    parts = {}
    for split, data in zip(("train", *spec.eval_splits), loaded, strict=True):
        table = Table(data.to_dict(), f"{_HUB_ID} {task} {split}")
        parts[split] = examples_from_table(spec, table, split, notes)
    train = parts.pop("train")
    return RawTask(spec, train, parts, notes)


def _why_unreachable() -> str | None:
    """None when the hub answers, else the reason in words.

    One request of at most ten seconds, because load_dataset itself tries for half a minute before
    it turns to its cache.
    """
    import huggingface_hub

    try:
        huggingface_hub.dataset_info(_HUB_ID, timeout=10)
    except Exception as error:
        if getattr(error, "response", None) is not None:
            return None  # it answered, if with an error: load_dataset says what to make of that
        if "offline mode" in str(error):
            return "HF_HUB_OFFLINE is set"
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


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
