"""Write the record of a run while it is at work."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.run import ErrorBlock, RunRecord
from sparsegrad_cli.records.store import RUN, write

_RESULTS = ("metrics", "memory", "time", "sizes", "sparsity")


class RunWriter:
    """Keep run.json of a run up to date: it is written whole at every milestone.

    Only rank zero writes the file.

    Args:
        folder: The run's folder.
        before: Of a resumed run, the record so far. Its blocks stand until they are set again.
        **blocks: First blocks. The status is ``running``.

    Attributes:
        path: The run's folder.
        record: The record as it is now.
    """

    def __init__(self, folder: Path, before: RunRecord | None = None, **blocks: object) -> None:
        self.path = folder
        begun = {"status": "running", "error": None, "started": now(), "finished": None}
        first = before or RunRecord(status="running")
        self.record = first.changed(**begun, **blocks)

    def save(self, **blocks: object) -> None:
        """Set blocks, each a model of records/run.py or the same as plain data, and write the file.

        Raises:
            ValidationError: A block does not exist, or is not what its model expects.
            DiskError: The file cannot be written.
        """
        self.record = self.record.changed(**blocks)
        if distributed.is_rank_zero():
            write(self.record, self.path / RUN)

    def forget_results(self) -> None:
        """Drop the results of an earlier end: the run trains again from here."""
        self.record = self.record.without(*_RESULTS)

    def finish(self, error: SparsegradError | None = None) -> None:
        """Set the final status and write the file. A run that is done stays done."""
        if self.record.status == "done":
            error = None
        self.save(
            status=error.status if error else "done",
            error=None if error is None else error_block(error),
            finished=now(),
        )


def error_block(error: SparsegradError) -> ErrorBlock:
    """Return an error as a record keeps it."""
    known = {key: value for key, value in error.details.items() if key in ErrorBlock.model_fields}
    return ErrorBlock(title=error.title, what=error.what, where=error.where, fix=error.fix, **known)
