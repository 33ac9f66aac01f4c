"""List the experiment trackers of ``train.report_to``, and set their names and output folders.

The callbacks of transformers drive the trackers, which read their output folders from environment
variables. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import is_file
from sparsegrad_cli.recipe.schema import TrainSection

# Name in report_to -> groups of packages. The tracker needs one package of each group.
TRACKERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "azure_ml": (("azureml",),),
    "clearml": (("clearml",),),
    "codecarbon": (("codecarbon",),),
    "comet_ml": (("comet_ml",),),
    "dagshub": (("dagshub",), ("mlflow",)),
    "dvclive": (("dvclive",),),
    "flyte": (("flytekit",),),
    "kubeflow": (("kubeflow",),),
    "mlflow": (("mlflow",),),
    "neptune": (("neptune",),),
    "swanlab": (("swanlab",),),
    "tensorboard": (("tensorboard", "tensorboardX"),),
    "trackio": (("trackio",),),
    "wandb": (("wandb",),),
}
_PACKAGES = {
    "azureml": "azureml-mlflow",
    "comet_ml": "comet-ml",
}  # Packages that have another name on PyPI.
PROJECT = "sparsegrad"
EXTRAS = ("mlflow", "tensorboard", "trackio", "wandb")  # Those of pyproject.toml.
# The folders that trackers write into a run's folder, and the file of their own names for the run.
FOLDERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet", "swanlab", "dvclive")
IDS = "trackers.json"


def named(report_to: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the trackers in ``report_to``; ``all`` means all that are installed."""
    names = (report_to,) if isinstance(report_to, str) else report_to
    if names == ("all",):
        return tuple(name for name in TRACKERS if missing_package(name) is None)
    return () if names == ("none",) else names


def missing_package(name: str) -> str | None:
    """Return what ``pip install`` needs for a tracker; None if nothing is missing."""
    for packages in TRACKERS[name]:
        if all(importlib.util.find_spec(package) is None for package in packages):
            extra = f"'sparsegrad[{name}]'"
            return extra if name in EXTRAS else _PACKAGES.get(packages[0], packages[0])
    return None


def study_of(run_dir: Path) -> Path | None:
    """Return the folder of the comparison that a run belongs to; None for a single run."""
    study = run_dir.absolute().parent.parent
    return study if is_file(study / "compare.json") else None


def project_of(run_dir: Path, train: TrainSection) -> str:
    """Return the project that trackers list a run under."""
    study = study_of(run_dir)
    return train.project or (study.name if study is not None else PROJECT)


def run_name_of(run_dir: Path, train: TrainSection) -> str:
    """Return the name of a run in trackers."""
    own = run_dir.absolute().name
    if train.run_name is None:
        return own
    # The runs of a comparison share their settings, and need different names.
    return f"{train.run_name}-{own}" if study_of(run_dir) is not None else train.run_name


def read_ids(run_dir: Path) -> dict[str, str]:
    """Return the trackers' own names of a run, by tracker; empty for a run that is new to them."""
    try:
        found = plain_json((run_dir / IDS).read_bytes())
    except (OSError, ValueError):
        return {}  # Then a resumed run is a new one for its trackers, and nothing else is lost.
    kept = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in kept if name in TRACKERS and isinstance(value, str)}


def write_ids(run_dir: Path, ids: Mapping[str, str]) -> None:
    """Keep the trackers' own names of a run, so that the resumed run continues in them."""
    write_json_atomic(run_dir / IDS, read_ids(run_dir) | dict(ids))


@contextmanager
def tracker_environment(run_dir: Path, train: TrainSection) -> Iterator[None]:
    """Make trackers write into the run's folder and group the runs of a comparison.

    Nothing is sent over the network unless the user's environment asks for it. Environment
    variables that the user has set are kept.

    Args:
        run_dir: the run's folder.
        train: the recipe's section.
    """
    names = named(train.report_to)
    folder, study = run_dir.absolute(), study_of(run_dir)
    project, ids = project_of(run_dir, train), read_ids(run_dir)
    # These show the runs of one store together, so the runs of a comparison share one.
    shared = study or folder
    wandb: dict[str, object] = {
        "WANDB_DIR": folder,
        "WANDB_CACHE_DIR": folder / "wandb" / "cache",
        "WANDB_DATA_DIR": folder / "wandb" / "data",
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": project,
        "WANDB_RUN_ID": ids.get("wandb") or uuid.uuid4().hex[:12],
        "WANDB_RESUME": "allow",
    }
    mlflow: dict[str, object] = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{shared / 'mlflow' / 'mlflow.db'}",
        "MLFLOW_EXPERIMENT_NAME": project,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    settings: dict[str, dict[str, object]] = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": folder / "tensorboard"},
        "wandb": wandb | ({"WANDB_RUN_GROUP": study.name} if study is not None else {}),
        "mlflow": mlflow | ({"MLFLOW_RUN_ID": ids["mlflow"]} if "mlflow" in ids else {}),
        "trackio": {"TRACKIO_DIR": shared / "trackio"},
        "comet_ml": {"COMET_OFFLINE_DIRECTORY": folder / "comet", "COMET_PROJECT_NAME": project},
        "swanlab": {"SWANLAB_LOG_DIR": folder / "swanlab", "SWANLAB_PROJECT": project},
        "clearml": {"CLEARML_PROJECT": project, "CLEARML_TASK": run_name_of(run_dir, train)},
    }
    wanted = {key: str(value) for name in names for key, value in settings.get(name, {}).items()}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    if "MLFLOW_TRACKING_URI" in added:
        (shared / "mlflow").mkdir(parents=True, exist_ok=True)  # SQLite makes the file alone.
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
