"""Write the files of a submission to gluebenchmark.com."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli.data.glue_test_splits import HiddenSplit, load_test_splits
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.predict.classifier import Classifier
from sparsegrad_cli.predict.predict_rows import CHUNK
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.tasks import GLUE_TASKS

# Tasks whose files hold the names of classes; those of the others hold their ids.
_BY_NAME = ("mnli", "qnli", "rte")
_HIGHEST_SCORE = 5.0  # Of STS-B, from 0.


def write_submission(
    classifier: Classifier,
    folder: Path,
    *,
    batch_size: int,
    observer: Observer | None = None,
) -> tuple[dict[Path, int], list[str]]:
    """Answer the test splits of a run's GLUE task, and write a file for each.

    A file has the columns ``index`` (from 0) and ``prediction``.

    Args:
        classifier: of a run.
        folder: where the files are written; made if it is missing.
        batch_size: rows of a batch.
        observer: receives the number of rows after each batch.

    Returns:
        File -> its rows, and notes for the user.

    Raises:
        UsageError: the model was not trained on a task of GLUE.
        DataError, DownloadError: see :func:`~.glue_test_splits.load_test_splits`.
    """
    section = classifier.task
    name = section.name.removeprefix("glue/") if section is not None else None
    if section is None or not section.name.startswith("glue/") or name not in GLUE_TASKS:
        trained = "an export, which does not know its task" if section is None else section.name
        raise UsageError(
            f"--glue needs a run of a GLUE task, got {trained}",
            where="--glue",
            fix="give the folder of a run whose task is glue/cola, glue/rte or another one of GLUE",
        )
    path = expanded(section.path) if section.path is not None else None
    splits, notes = load_test_splits(name, path)
    written: dict[Path, int] = {}
    observer = observer or Observer()
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        answers = _answers(classifier, split, name, batch_size, observer)
        lines = ["index\tprediction", *(f"{row}\t{text}" for row, text in enumerate(answers))]
        write_text_atomic(folder / split.file, "\n".join(lines) + "\n")
        written[folder / split.file] = len(answers)
    return written, notes


def _answers(
    classifier: Classifier,
    split: HiddenSplit,
    task: str,
    batch_size: int,
    observer: Observer,
) -> list[str]:
    """Return the predictions of a split as GLUE writes them."""
    answers: list[str] = []

    def done(rows: int) -> None:
        observer.step(split.file, {"step": len(answers) + rows})

    observer.total_steps(split.file, len(split.texts[0]), unit="rows")
    names = classifier.label_names
    for start in range(0, len(split.texts[0]), CHUNK):
        texts = [part[start : start + CHUNK] for part in split.texts]
        outputs = classifier.predict(texts, batch_size, done).probabilities
        if names is None:
            answers += [f"{min(max(value, 0.0), _HIGHEST_SCORE):.3f}" for value in outputs[:, 0]]
        elif task in _BY_NAME:
            answers += [names[number] for number in outputs.argmax(axis=1)]
        else:
            answers += [str(number) for number in outputs.argmax(axis=1)]
    return answers
