"""Let a chat model answer the rows of a file, or single texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.predict.output import PREDICTION, STOPPED
from sparsegrad_cli.predict.predict_rows import Summary, texts_of
from sparsegrad_cli.predict.row_stream import Row
from sparsegrad_cli.tasks.answerer import Answerer

# Usual columns of a question, the likeliest first.
_COLUMNS = ("prompt", "question", "instruction", "text")
ADDED = (PREDICTION, STOPPED)


def question_column(names: Sequence[str], given: str | None) -> str:
    """Return the column of a file that holds the questions.

    Args:
        names: columns of the file.
        given: the name that the user gave.

    Raises:
        UsageError: there is no such column.
    """
    wanted = (given,) if given is not None else _COLUMNS
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise UsageError(
            f"the file has no column {' or '.join(map(repr, wanted))} for the questions",
            where="--text-column",
            fix=f"--text-column NAME; columns found: {listed(list(names))}",
        )
    return found


def answer_rows(
    answerer: Answerer, batches: Iterable[list[Row]], column: str, summary: Summary
) -> Iterator[tuple[list[Row], list[dict[str, Any]]]]:
    """Yield every batch with the columns that answers add to its rows.

    Rows are answered one by one as single questions. Those of a batch are padded to one length,
    which changes numbers by rounding: where two tokens are nearly tied, another one may follow.

    Args:
        answerer: the model.
        batches: rows with the column ``column``; a batch is answered at a time.
        column: name of the column of the question.
        summary: counts the rows, those with an empty question, and those whose answer was cut.

    Raises:
        DataError: a question is not text, or the chat template refuses it.
    """
    for batch in batches:
        (texts,), empty = texts_of(batch, [column])
        questions = [[Turn("user", text)] for text in texts]
        try:
            answers = answerer.answer(questions, batch[0].place)
        except DataError as error:
            places = batch[0].place if len(batch) == 1 else f"{batch[0].place} and after"
            raise DataError(error.what, where=places, fix=error.fix) from None
        summary.rows += len(batch)
        summary.empty += empty
        summary.cut += sum(answer.stopped != "end" for answer in answers)
        yield batch, [{PREDICTION: each.text, STOPPED: each.stopped} for each in answers]
