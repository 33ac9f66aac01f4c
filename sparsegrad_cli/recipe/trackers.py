"""The experiment trackers of ``train.report_to``: which there are, and where they write. No torch.

transformers' callbacks talk to them; they read the place of their files from the environment.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsegrad_cli.io.paths import is_file

# Name in report_to -> the packages that it needs, of each group one.
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
_PACKAGES = {"azureml": "azureml-mlflow", "comet_ml": "comet-ml"}  # where pip has another name
PROJECT = "sparsegrad"
# What trackers leave in a run's folder.
FOLDERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet", "swanlab", "dvclive")


def named(report_to: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the trackers that ``report_to`` asks for; ``all`` stands for those installed."""
    names = (report_to,) if isinstance(report_to, str) else report_to
    if names == ("all",):
        return tuple(name for name in TRACKERS if missing_package(name) is None)
    return () if names == ("none",) else names


def missing_package(name: str) -> str | None:
    """Return what to install for a tracker, by pip's name; None where nothing is missing."""
    for packages in TRACKERS[name]:
        if all(importlib.util.find_spec(package) is None for package in packages):
            return _PACKAGES.get(packages[0], packages[0])
    return None


def study_of(run_dir: Path) -> Path | None:
    """Return the folder of the comparison that a run belongs to, if it does."""
    study = run_dir.absolute().parent.parent
    return study if is_file(study / "compare.json") else None


@contextmanager
def tracker_environment(run_dir: Path, report_to: str | tuple[str, ...]) -> Iterator[None]:
    """Inside, trackers write into the run's folder and group the runs of a comparison.

    A place or name that the user has set in the environment stands.
    """
    names = named(report_to)
    folder, study = run_dir.absolute(), study_of(run_dir)
    group = study.name if study is not None else PROJECT
    # MLflow shows the runs of one store together: those of a comparison share it.
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
