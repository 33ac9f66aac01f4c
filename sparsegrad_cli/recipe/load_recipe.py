"""Load a recipe file and overrides into a checked :class:`Recipe`. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.recipe.checks import recipe_problems
from sparsegrad_cli.recipe.effects import Found, padding_anyway, without_idle
from sparsegrad_cli.recipe.layers import anchor_paths, read_layers, stack
from sparsegrad_cli.recipe.optimizers import DEFAULT_OPTIMIZER
from sparsegrad_cli.recipe.problems import explain
from sparsegrad_cli.recipe.schema import Recipe, TrainSection
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.yaml_source import (
    KeyPath,
    Layer,
    Place,
    clip,
    dotted,
    dump,
    find_place,
    setting,
)

SectionT = TypeVar("SectionT", bound=BaseModel)
_MOST_PROBLEMS = 100  # how many are reported
# Keys of later versions, which count in a digest only if they are set.
_TASK_KEYS = (
    *("separator", "type", "positive_label", "label_separator"),
    *("mix", "mix_until", "evaluation", "holdout", "test_unused"),
)
_TRAIN_KEYS = (
    *("optim_args", "head_learning_rate", "lora_plus_ratio", "class_weights"),
    *("project", "run_name", "unpadded"),
    *("loss", "loss_buckets", "loss_bucket_positions", "loss_bucket_classes", "loss_mix"),
    *("loss_neighbours", "loss_rounds"),
    *("sample_prompts", "sample_max_new_tokens", "sample_temperature"),
)


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, and where each of its keys was written.

    Attributes:
        recipe: The resolved recipe.
        source: The file or shipped recipe that it came from.
        places: Where each key path was written; other keys hold defaults.
        notes: Settings that stronger ones have disabled.
    """

    recipe: Recipe
    source: str
    places: Mapping[KeyPath, Place] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        """Return ``file:line: key`` of a dotted key, for error messages."""
        return f"{find_place(self.places, tuple(key.split('.')))}: {key}"


def load_recipe(
    source: str | Path | None,
    overrides: tuple[str, ...] = (),
    *,
    data: bool = True,
    output_dir: Path | None = None,
) -> LoadedRecipe:
    """Read, stack and check a recipe.

    Args:
        source: A YAML file or the name of a shipped recipe; None is the shipped ``quickstart``.
        overrides: ``key.path=value`` texts, which are stronger than the recipe.
        data: Whether the task's files must exist.
        output_dir: Stronger than all; used as it is, not read as YAML.

    Raises:
        RecipeError: All problems together, each with file, line and key.
    """
    name = str(source) if source is not None else "configs/quickstart.yaml"
    layers = read_layers(name, overrides)
    if output_dir is not None:
        layers.append(setting("output_dir", str(output_dir)))
        anchor_paths(layers[-1].data, Path.cwd())
    loaded, idle = resolve(stack(layers), name, data=data)
    return replace(loaded, notes=(*loaded.notes, *(found.note() for found in idle)))


def resolve(layer: Layer, source: str, *, data: bool = True) -> tuple[LoadedRecipe, list[Found]]:
    """Check stacked layers, and reset the settings that have no effect.

    Args:
        layer: All layers of the recipe.
        source: The name of the recipe or study, for messages.
        data: Whether the task's files must exist.

    Returns:
        The recipe, and the settings that were reset although they had been written.

    Raises:
        RecipeError: All problems together, each with file, line and key.
    """
    written = check(layer, Recipe)
    recipe, idle = without_idle(written, layer)
    problems = [found.problem() for found in idle if found.refused]
    problems += recipe_problems(written if problems else recipe, layer.places, data=data)
    if problems:
        raise RecipeError(problems)
    return LoadedRecipe(recipe, source, layer.places, tuple(layer.notes)), idle


def check(layer: Layer, schema: type[SectionT]) -> SectionT:
    """Validate a layer's data; raise all problems together as one :class:`RecipeError`."""
    problems = list(layer.problems)
    checked: SectionT | None = None
    try:
        checked = schema.model_validate(_lists_to_tuples(layer.data))
    except ValidationError as error:
        for detail in error.errors(include_url=False)[: _MOST_PROBLEMS + 1]:
            if _counts_valid_items_only(detail):
                continue
            path, what, fix = explain(detail, schema)
            place = find_place(layer.places, path)
            what += _others(detail, path, layer)
            problems.append(place.problem(dotted(path), clip(what), fix))
    if problems or checked is None:
        raise RecipeError(_sorted(problems))
    return checked


def _counts_valid_items_only(detail: Any) -> bool:
    """Return whether a list is long enough, and pydantic has left its invalid items out.

    Each of those has a problem of its own.
    """
    given = detail["input"]
    if detail["type"] != "too_short" or not isinstance(given, tuple):
        return False
    return bool(len(given) >= detail["ctx"]["min_length"])


def _others(detail: Any, blamed: KeyPath, layer: Layer) -> str:
    """Return where the other keys of a problem were written: `` (method.density: r.yaml:4)``."""
    error = (detail.get("ctx") or {}).get("error")
    keys = getattr(error, "keys", ())
    section = blamed[: len(blamed) - len(keys[0].split("."))] if keys else ()
    paths = [(*section, *key.split(".")) for key in keys[1:]]
    places = [f"{dotted(path)}: {layer.places[path]}" for path in paths if path in layer.places]
    return f" ({', '.join(places)})" if places else ""


def _sorted(problems: list[Problem]) -> list[Problem]:
    """Sort problems by file and line, and keep the first ones of very many."""
    problems = sorted(problems, key=lambda p: (p.file or "", p.line or 0))
    if len(problems) <= _MOST_PROBLEMS:
        return problems
    last = problems[_MOST_PROBLEMS]
    more = Problem("(more)", "there are more problems; fix these first", last.file, last.line)
    return [*problems[:_MOST_PROBLEMS], more]


def _lists_to_tuples(value: Any) -> Any:
    """Turn the lists of YAML into tuples, which frozen sections hold."""
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return value


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain data, with every default."""
    plain: dict[str, Any] = json.loads(recipe.model_dump_json())
    return plain


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested dicts, such as those of :func:`to_plain`."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return dump(to_plain(recipe))


def digest(recipe: Recipe) -> str:
    """Return the SHA-256 (hex) of the resolved recipe without ``output_dir``.

    A key that was added in a later version counts only if it is set and has an effect, so that
    recipes without it keep their digest.
    """
    plain = to_plain(recipe)
    plain.pop("output_dir")
    if recipe.init_from is None:
        del plain["init_from"]
    if recipe.model.quantization is None:
        del plain["model"]["quantization"]
    if plain["method"].get("entries", 0) is None:
        del plain["method"]["entries"]
    if recipe.calibration.select == "random":
        del plain["calibration"]["select"]
    for key in _TASK_KEYS:
        if plain["task"][key] == TaskSection.model_fields[key].default:
            del plain["task"][key]
    if plain["task"]["columns"] and plain["task"]["columns"]["labels"] is None:
        del plain["task"]["columns"]["labels"]
    if recipe.train.optim == DEFAULT_OPTIMIZER:
        del plain["train"]["optim"]
    if padding_anyway(recipe):
        plain["train"]["unpadded"] = True
    for key in _TRAIN_KEYS:
        if plain["train"][key] == TrainSection.model_fields[key].default:
            del plain["train"][key]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def with_settings(recipe: Recipe, settings: Mapping[str, Any], seed: int | None = None) -> Recipe:
    """Return a recipe with some dotted keys changed, and optionally another seed.

    Raises:
        RecipeError: a value is not valid for its key.
    """
    plain = to_plain(recipe)
    for key, value in settings.items():
        section: Any = plain
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        section[name] = value
    if seed is not None:
        plain["seed"] = seed
    return check(Layer(plain), Recipe)
