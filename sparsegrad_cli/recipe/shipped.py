"""Find the recipes, studies and launcher settings that come with the package. No torch."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.paths import exists, expanded, is_file

_PACKAGE = Path(__file__).resolve().parent.parent


# Settings of accelerate's launcher are YAML files, too, but not recipes.
LAUNCHERS = "configs/accelerate"


def shipped_folder(kind: str) -> Path:
    """Return the folder of ``configs``, ``recipes`` or ``LAUNCHERS``, in a wheel or a checkout."""
    in_wheel = _PACKAGE / "_shipped" / kind
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / kind


def shipped_files(kind: str) -> list[Path]:
    """Return the YAML files of a kind, sorted by name."""
    return sorted(shipped_folder(kind).glob("*.yaml"))


def find_recipe(source: str | Path, relative_to: Path | None = None) -> Path | None:
    """Return a recipe by its path, or by the name of a shipped one such as ``roberta_glue``.

    A file in the current folder (or beside the recipe that extends it) wins over a shipped one.
    """
    given = expanded(source)
    places = [given] if given.is_absolute() or relative_to is None else [relative_to / given, given]
    for place in places:
        if exists(place):
            return place
    if given.is_absolute() or given.parent.name not in ("", "configs", "recipes"):
        return None
    kinds = [given.parent.name] if given.parent.name else ["configs", "recipes"]
    for kind in kinds:
        for name in (given.name, f"{given.name}.yaml"):
            path = shipped_folder(kind) / name
            if is_file(path):
                return path
    return None


def is_of_run(path: Path) -> bool:
    """Return whether a file is the resolved recipe in a run's folder."""
    return path.name == "recipe.yaml" and is_file(path.parent / "run.json")


def recipe_of_run(source: str | Path) -> Path | None:
    """Return the resolved recipe in a run's folder; None if ``source`` is not such a folder.

    Raises:
        FileFormatError: The folder holds a run without its recipe.
    """
    path = Path(source) / "recipe.yaml"
    if is_file(path):
        return path
    if is_file(Path(source) / "run.json"):
        raise missing_recipe(Path(source))
    return None


def missing_recipe(folder: Path) -> FileFormatError:
    """Return the error of a run's folder without recipe.yaml."""
    return FileFormatError(
        f"the run in {folder} has no recipe.yaml", where=str(folder), fix=restore_advice(folder)
    )


def restore_advice(folder: Path) -> str:
    """Return what to do about a missing or damaged recipe.yaml in a run's folder."""
    return (
        f"restore {folder / 'recipe.yaml'} from a copy; without one, move aside what is there and "
        "resume with the recipe and the overrides that the run was started with, which writes it "
        f"again: sparsegrad train RECIPE KEY=VALUE... -o {folder} --resume"
    )
