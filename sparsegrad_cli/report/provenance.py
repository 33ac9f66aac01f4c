"""Show the origin of a record: machine, versions, recipe, code and hashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sparsegrad_cli.records.run import EnvironmentBlock, GitBlock, HashesBlock, RunRecord
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.document import Table
from sparsegrad_cli.report.units import words

Rows = list[tuple[str, str | None]]
_ENVIRONMENT = ("python", "platform", "cpu", "device", "device_name", "threads")
# Fields that can differ between the runs of a study with the same recipe.
_OF_RUNS: dict[str, Callable[[EnvironmentBlock, GitBlock], object]] = {
    "commit": lambda environment, git: git.commit,
    "device": lambda environment, git: environment.device,
    "device name": lambda environment, git: environment.device_name,
    "threads": lambda environment, git: environment.threads,
    "torch": lambda environment, git: environment.packages.get("torch"),
}


def provenance(record: RunRecord | StudyRecord) -> Table:
    """Return the provenance table at the end of every report."""
    environment, git = record.environment or EnvironmentBlock(), record.git or GitBlock()
    rows: Rows = [
        ("started", words(record.started)),
        ("finished", words(record.finished)),
        ("command", record.command),
        *(_recipe(record) if isinstance(record, RunRecord) else _study(record)),
        ("commit", words(git.commit)),
    ]
    if git.dirty:
        rows.append(("uncommitted changes", "yes: the commit does not describe the code fully"))
    rows += [(key.replace("_", " "), _text(getattr(environment, key))) for key in _ENVIRONMENT]
    rows += environment.packages.items()
    rows += _precision(record) if isinstance(record, RunRecord) else _runs(record)
    shown = [(label, value) for label, value in rows if value]
    return Table("Provenance", ("what", "value"), shown, (True, True))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _study(study: StudyRecord) -> Rows:
    return [("matched by", study.match), ("runs at once", _text(study.jobs))]


def _runs(study: StudyRecord) -> Rows:
    """Return the origin of a study's runs; ``1 (20 runs), 2 (4 runs)`` if they differ."""
    rows: Rows = []
    runs = [cell.run for cell in study.cells if cell.run]
    for label, value_of in _OF_RUNS.items():
        blocks = ((run.environment or EnvironmentBlock(), run.git or GitBlock()) for run in runs)
        counts = Counter(str(found) for both in blocks if (found := value_of(*both)) is not None)
        parts = [f"{value} ({count} runs)" for value, count in counts.items()]
        rows.append(
            (f"{label} of runs", next(iter(counts)) if len(counts) == 1 else ", ".join(parts))
        )
    return rows


def _recipe(run: RunRecord) -> Rows:
    return [("output_dir", run.output_dir)]


def _precision(run: RunRecord) -> Rows:
    if not run.precision:
        return []
    dtypes = " and ".join(run.precision.weights)
    autocast, matmul = run.precision.autocast or "no", words(run.precision.matmul)
    return [("precision", f"{dtypes} weights, {autocast} autocast, {matmul} matmul")]


def hashes_table(run: RunRecord) -> Table | None:
    """Return the digests of a run's inputs, folded; two runs with equal ones had equal inputs."""
    hashes = run.hashes or HashesBlock()
    last = max(hashes.order, default=0)
    rows: Rows = [
        ("recipe", run.recipe_digest),
        ("target modules", run.model.fingerprint if run.model else None),
        ("data", hashes.data),
        ("head initialization", hashes.head_init),
        ("precision", hashes.precision),
        (f"order of {last:,} steps", hashes.order.get(last)),
        ("basis", run.calibration.digest if run.calibration else None),
    ]
    shown = [(label, value) for label, value in rows if value]
    if not shown:
        return None
    header = ("digest of", "sha256")
    return Table("Hashes", header, shown, (True, True), folded="Hashes of the inputs")
