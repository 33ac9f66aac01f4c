"""Settings that exclude quantization are refused together, before anything loads."""

from __future__ import annotations

import pytest
from support.cli_runs import Cli

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe

BITS = ("8bit", "4bit")
FOUR = "model={name: builtin:minilm, quantization: 4bit}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "method",
    [
        ("method=lora",),
        ("method=sparsegrad",),
        ("method.support=dynamic",),
        ("method.support=refresh", "calibration.score=square"),
        ("calibration.source=random",),
        ("calibration.source=original", "calibration.decomposition=exact"),
    ],
)
def test_cores_and_lora_accept_quantization(method: tuple[str, ...], bits: str) -> None:
    loaded = load_recipe(None, (f"model.quantization={bits}", *method))
    assert loaded.recipe.model.quantization == bits


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (("method=full",), ["method.name"]),
        (("method=meprop",), ["method.name"]),
        (("method.form=rotated",), ["calibration.source", "method.form"]),
        (("method.form=materialized",), ["calibration.source", "method.form"]),
        (("scope=rest",), ["scope"]),
        (("calibration.source=batch",), ["calibration.source"]),
        (("calibration.decomposition=sequential",), ["calibration.source"]),
        (("train.torch_compile=true",), ["train.torch_compile"]),
        (
            ("method.form=rotated", "scope=rest", "train.torch_compile=true", "task=glue/nope"),
            ["calibration.source", "method.form", "scope", "task.name", "train.torch_compile"],
        ),
    ],
)
def test_all_settings_that_exclude_quantization_are_refused_together(
    overrides: tuple[str, ...], keys: list[str]
) -> None:
    load_recipe(None, tuple(o for o in overrides if o != "task=glue/nope"))  # fine without
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, (FOUR, *overrides))
    assert sorted(problem.key for problem in caught.value.problems) == keys
    assert all(problem.fix for problem in caught.value.problems)


def test_the_refusal_names_place_and_fix(cli: Cli) -> None:
    outcome = cli("validate", "quickstart", FOUR, "method=full")
    assert outcome.code == 2
    assert "full trains the weights, and model.quantization '4bit' freezes them" in outcome.flat
    assert "sparsegrad (form core) or lora" in outcome.flat
    other = cli("validate", "quickstart", "model.quantization=3bit")
    assert other.code == 2 and "8bit" in other.flat and "4bit" in other.flat


def test_quantization_is_part_of_the_digest() -> None:
    plain = load_recipe(None).recipe
    assert digest(load_recipe(None, ("model.quantization=null",)).recipe) == digest(plain)
    packed = [digest(load_recipe(None, (f"model.quantization={b}",)).recipe) for b in BITS]
    assert len({digest(plain), *packed}) == 3
