"""Write the report files of runs and studies into their folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.document import SideBySide
from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document
from sparsegrad_cli.report.study import ChartCache, study_document

# Reads the answers in the folder of a study.
AnswersReader = Callable[[Path, StudyRecord], Sequence[SideBySide]]


def write_run_report(folder: Path, run: RunRecord) -> None:
    """Write ``report.md`` and ``report.html`` of a training or calibration run.

    Raises:
        DiskError: a file could not be written.
    """
    document = run_document(run)
    write_text_atomic(folder / "report.md", render(document, "md"))
    write_text_atomic(folder / "report.html", render(document, "html"))


def write_study_report(
    folder: Path,
    study: StudyRecord,
    answers: Sequence[SideBySide] = (),
    charts: ChartCache | None = None,
) -> None:
    """Write ``report.md``, ``report.tex`` and ``report.html``, with the same numbers in each.

    Args:
        folder: the study's folder.
        study: its record.
        answers: the answers of its models to the same questions.
        charts: the charts of the previous page.

    Raises:
        DiskError: a file could not be written.
    """
    charts = charts or ChartCache()
    document = study_document(study, answers, charts)
    write_text_atomic(folder / "report.md", render(document, "md"))
    write_text_atomic(folder / "report.tex", render(document, "tex"))
    write_text_atomic(folder / "report.html", render(document, "html"))
    charts.finish_page()


class LiveReport:
    """Write the page each time compare.json is written, and all reports at the end.

    A page that cannot be written does not stop a study that runs for hours; only the first such
    error is printed. Errors of the reports at the end are raised.

    Args:
        folder: the study's folder.
        tell: receives the error.
        read_answers: reads the answers in the folder.
    """

    def __init__(
        self, folder: Path, tell: Callable[[str], None], read_answers: AnswersReader
    ) -> None:
        self._folder, self._tell, self._read_answers = folder, tell, read_answers
        self._charts = ChartCache()
        self._told = False

    def __call__(self, study: StudyRecord) -> None:
        if study.status != "running":
            answers = self._read_answers(self._folder, study)
            write_study_report(self._folder, study, answers, self._charts)
            return
        try:
            answers = self._read_answers(self._folder, study)
            page = render(study_document(study, answers, self._charts), "html")
            write_text_atomic(self._folder / "report.html", page)
            self._charts.finish_page()
        except Exception as error:
            if not self._told:
                self._tell(f"the live report could not be written: {error}")
            self._told = True
