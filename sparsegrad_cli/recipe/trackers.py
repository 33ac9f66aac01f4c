"""List the experiment trackers of ``train.report_to``, and set their output folders.

The callbacks of transformers drive the trackers, which read their output folders from environment
variables. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsegrad_cli.io.paths import is_file

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
# The folders that trackers write into a run's folder.
FOLDERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet", "swanlab", "dvclive")


def named(report_to: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the trackers in ``report_to``; ``all`` means all that are installed."""
    names = (report_to,) if isinstance(report_to, str) else report_to
    if names == ("all",):
        return tuple(name for name in TRACKERS if missing_package(name) is None)
    return () if names == ("none",) else names


def missing_package(name: str) -> str | None:
    """Return the package to install for a tracker, by its name on PyPI; None if none is missing."""
    for packages in TRACKERS[name]:
        if all(importlib.util.find_spec(package) is None for package in packages):
            return _PACKAGES.get(packages[0], packages[0])
    return None


def study_of(run_dir: Path) -> Path | None:
    """Return the folder of the comparison that a run belongs to; None for a single run."""
    study = run_dir.absolute().parent.parent
    return study if is_file(study / "compare.json") else None


@contextmanager
def tracker_environment(run_dir: Path, report_to: str | tuple[str, ...]) -> Iterator[None]:
    """Make trackers write into the run's folder and group the runs of a comparison.

    Environment variables that the user has set are kept.

    Args:
        run_dir: the run's folder.
        report_to: the setting ``train.report_to``.
    """
    names = named(report_to)
    folder, study = run_dir.absolute(), study_of(run_dir)
    group = study.name if study is not None else PROJECT
    # MLflow shows the runs of one store together, so the runs of a comparison share one.
    store = (study or folder) / "mlflow"
    settings: dict[str, dict[str, object]] = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": folder / "tensorboard"},
        "wandb": {"WANDB_DIR": folder, "WANDB_PROJECT": PROJECT}
        | ({"WANDB_RUN_GROUP": group} if study is not None else {}),
        "mlflow": {"MLFLOW_TRACKING_URI": store.as_uri(), "MLFLOW_EXPERIMENT_NAME": group},
        "trackio": {"TRACKIO_DIR": folder / "trackio"},
        "comet_ml": {"COMET_OFFLINE_DIRECTORY": folder / "comet", "COMET_PROJECT_NAME": group},
        "swanlab": {"SWANLAB_LOG_DIR": folder / "swanlab", "SWANLAB_PROJECT": group},
        "clearml": {"CLEARML_PROJECT": group, "CLEARML_TASK": folder.name},
    }
    wanted = {key: str(value) for name in names for key, value in settings.get(name, {}).items()}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
