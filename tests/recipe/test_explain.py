"""`sparsegrad explain`: every key and method of the schema, as the schema has it."""

from __future__ import annotations

import json
import re

import pytest
from support.cli_runs import Cli

from sparsegrad_cli.methods.registry import ALL_NAMES, METHODS
from sparsegrad_cli.recipe.explain_key import Key, explain_key, methods, sections
from sparsegrad_cli.recipe.schema import Recipe, TrainSection


def every_key(keys: list[Key]) -> list[Key]:
    """Return the keys and all keys below them."""
    found = []
    for key in keys:
        found.append(key)
        for name in key.inner:
            found += every_key([k for k in explain_key(f"{key.path}.{name}") if k.owner != "study"])
    return found


def test_every_key_of_a_recipe_has_meaning_and_type() -> None:
    keys = every_key([key for key in sections() if key.path != "method"])
    for key in keys:
        assert key.meaning, key.path
        assert key.inner or key.type, key.path
    assert {k.path for k in keys if k.path.startswith("train.")} == {
        f"train.{name}" for name in TrainSection.model_fields
    }
    assert [key.path for key in sections()] == list(Recipe.model_fields)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_explained(name: str) -> None:
    (key,) = explain_key(name)
    assert key.meaning and "``" not in key.meaning
    for field in key.inner:
        found = [k for k in explain_key(f"method.{field}") if name in k.owner.split(", ")]
        assert len(found) == 1
        assert found[0].meaning, field


def test_every_name_of_a_method_is_known() -> None:
    assert all(len(explain_key(name)) == 1 for name in ALL_NAMES)
    assert len(methods()) == len(METHODS)


def test_types_and_defaults_are_those_of_the_schema() -> None:
    (rate,) = explain_key("train.learning_rate")
    assert (rate.type, rate.default) == ("a number, above 0", "0.001")
    (form,) = (k for k in explain_key("method.form") if "sparsegrad" in k.owner)
    assert form.type == "one of core, rotated, materialized"
    (steps,) = explain_key("train.eval_steps")
    assert (steps.type, steps.default) == ("a whole number, at least 1", "null")
    assert {k.path for k in explain_key("learning_rate")} >= {"train.learning_rate"}


def test_command(cli: Cli) -> None:
    shown = cli("explain", "train.warmup_steps").out
    assert shown.splitlines()[0].strip() == "train.warmup_steps"
    assert "a share of all steps if below 1" in " ".join(shown.split())
    whole = cli("explain").out
    assert all(name in whole for name in (*METHODS, *Recipe.model_fields))
    (dora,) = json.loads(cli("explain", "dora", "--json").out)
    assert "{name: peft, type: LORA, use_dora: true}" in dora["meaning"]
    wrong = cli("explain", "learing_rate")
    assert (wrong.code, "did you mean learning_rate?" in wrong.flat) == (2, True)
    assert cli("explain", "no such thing at all").code == 2


def test_env(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    ended = cli("env")
    assert ", 1 thread\n" in re.sub(" +\n", "\n", ended.out)
    assert (ended.code, "hf_secret" in ended.out) == (0, False)
    found = json.loads(cli("env", "--json").out)
    assert found["packages"]["torch"] in ended.out
    assert found["variables"]["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in found["variables"]
