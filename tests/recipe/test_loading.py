"""Recipes: precedence, errors with file and line, overrides, digests, shipped files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPO

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe, to_yaml
from sparsegrad_cli.recipe.yaml_source import parse_yaml


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path | str | None, *overrides: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return {p.key: f"{p.where} {p.what} {p.fix or ''}" for p in caught.value.problems}


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.recipe.method.name == "sparsegrad"


def test_keys_in_the_readme_are_accepted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "r.yaml",
        "model: roberta-base\n"
        "task: {name: glue/rte}\n"
        "method: {name: sparsegrad, density: 0.012}\n"
        "scope: head\n"
        "calibration: {steps: 32}\n"
        "train: {learning_rate: 3.05e-5, per_device_train_batch_size: 32, num_train_epochs: 20}\n"
        "seed: 42\n"
        "output_dir: runs/my-run\n",
    )
    recipe = load_recipe(path).recipe
    assert recipe.model.name == "roberta-base"
    assert isinstance(recipe.method, SparsegradSettings) and recipe.method.density == 0.012
    assert recipe.train.learning_rate == 3.05e-5
    assert recipe.train.num_train_epochs == 20
    assert recipe.output_dir == str(tmp_path / "runs" / "my-run")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("3.05e-5", 3.05e-5), (".5", 0.5), ("-2", -2), ("10", 10)],
)
def test_numbers_follow_yaml_1_2(text: str, value: float) -> None:
    assert parse_yaml(f"x: {text}", "t").data["x"] == value
    assert parse_yaml(f"x: '{text}'", "t").data["x"] == text


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy"])
def test_a_bare_no_is_read_as_text(key: str) -> None:
    recipe = load_recipe(None, (f"train.{key}=no",)).recipe
    assert getattr(recipe.train, key) == "no"


def test_all_problems_are_reported_together_with_line_and_suggestion(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "r.yaml",
        "modle: x\n"
        "task: glue/rtee\n"
        "train:\n"
        "  learning_rate: '1e-4'\n"
        "  num_train_epoch: 3\n"
        "  lr: 2\n"
        "method: {name: sparsegrad, density: 2}\n",
    )
    found = problems_of(path)
    assert "r.yaml:1: modle" in found["modle"] and "did you mean model?" in found["modle"]
    assert "r.yaml:4" in found["train.learning_rate"]
    assert "without quotes" in found["train.learning_rate"]
    assert "r.yaml:5" in found["train.num_train_epoch"]
    assert "did you mean num_train_epochs?" in found["train.num_train_epoch"]
    assert "train.learning_rate" in found["train.lr"]
    assert (
        "r.yaml:7" in found["method.density"]
        and "less than or equal to 1" in found["method.density"]
    )


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("method.density=0", "method.density", "greater than 0"),
        ("method.density=-0.1", "method.density", "greater than 0"),
        ("method.density=1.5", "method.density", "less than or equal to 1"),
        ("method.name=sparsgrad", "method.name", "did you mean sparsegrad?"),
        ("task.name=glue/colla", "task.name", "did you mean glue/cola?"),
        ("task.path=/no/such/place", "task.path", "no such file or folder"),
        ("model=./no-such-model", "model.name", "no such folder"),
        ("model=builtin:minlm", "model.name", "did you mean builtin:minilm?"),
        ("calibration.basis=none.safetensors", "calibration.basis", "no such file"),
        ("scope=all", "scope", "not one of"),
        ("seed=1.5", "seed", "expected a whole number, got 1.5"),
        ("train=5", "train", "expected a mapping of keys, got 5"),
        ("calibration=[]", "calibration", "expected a mapping of keys, got []"),
        ("train.learning_rate=true", "train.learning_rate", "expected a number, got True"),
        ("train.head_lr=1", "train.head_lr", "did you mean head_learning_rate?"),
        ("train.zzz=1", "train.zzz", "warmup_steps, weight_decay, head_learning_rate and 38 more"),
        ("train.max_steps=0", "train.max_steps", "must be -1"),
        ("targets.blocks='::0'", "targets.blocks", "step cannot be zero"),
        ("match=trainable method.name=lora", "match", ""),
    ],
)
def test_invalid_values_are_named(override: str, key: str, says: str) -> None:
    found = problems_of(None, *override.split(" "))
    if key == "match":
        assert any("density" in text for text in found.values())
        return
    assert says in found[key]
    assert "command line" in found[key]


CORE = ("method.form=core", "method.support=static")
PAPER = ("method.form=materialized",)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("calibration.source=token", "calibration.decomposition=sequential"), "needs source"),
        ((*PAPER, "calibration.power_steps=1"), "decomposition 'randomized'"),
        ((*PAPER, "calibration.decomposition=randomized"), "needs method.form 'core'"),
        (
            ("calibration.decomposition=randomized", *CORE, "method.rank=0.9"),
            "a share of energy",
        ),
        ((*PAPER, "calibration.decomposition=sequential"), "needs method.form 'core'"),
        ((*CORE, "calibration.source=batch", "method.allocation=model"), "compares targets"),
        (
            ("method.form=core", "method.support=dense", "method.allocation=model"),
            "support 'static'",
        ),
        (("method.form=core", "method.refresh_steps=5"), "support 'refresh'"),
        ((*CORE, "method.state_capacity=2"), "support 'dynamic'"),
        (("method.form=core", "method.state_capacity=2"), "support 'dynamic'"),
        ((*PAPER, "method.support=refresh"), "support is dynamic"),
        ((*PAPER, "method.rank=8"), "for form core"),
        (("method={name: meprop, select: rows, state_capacity: 2}",), "select: entries"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    overrides: tuple[str, ...], says: str
) -> None:
    assert says in "".join(problems_of(None, *overrides).values())


@pytest.mark.parametrize(
    "overrides",
    [
        (*CORE, "method.rank=64", "calibration.decomposition=randomized"),
        (*CORE, "method.rank=0.9", "calibration.decomposition=sequential"),
        (*CORE, "method.allocation=model", "calibration.source=token"),
        (*CORE, "method.allocation=model", "calibration.score=square"),
        ("method.form=core", "method.support=refresh", "method.refresh_steps=7"),
        (*PAPER, "method.state_capacity=4"),
        ("method.form=core", "method.rank=64MiB", "calibration.decomposition=randomized"),
        ("method.form=core", "method.rank='1.5 GiB'"),
        ("method={name: meprop, state_capacity: 2}",),
    ],
)
def test_settings_that_fit_together_are_accepted(overrides: tuple[str, ...]) -> None:
    assert load_recipe(None, overrides).recipe.method.name in ("sparsegrad", "meprop")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("token", "randomized", 50)),
        (("method.rank=0.9",), ("token", "exact", 50)),
        (("calibration.source=batch",), ("batch", "randomized", 50)),
        (("calibration.decomposition=sequential",), ("batch", "sequential", 50)),
        (("calibration.source=random",), ("random", "exact", 50)),
        (("calibration.warmup_steps=0",), ("token", "randomized", 0)),
        (PAPER, ("batch", "exact", 0)),
        (("method.form=rotated",), ("batch", "exact", 0)),
        (("method=lora",), ("batch", "exact", 0)),
    ],
)
def test_calibration_defaults_follow_the_form(
    overrides: tuple[str, ...], expected: tuple[str, str, int]
) -> None:
    found = load_recipe(None, overrides).recipe.calibration
    assert (found.source, found.decomposition, found.warmup_steps) == expected


def test_a_value_of_the_wrong_type_names_the_expected_type(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "r.yaml",
        "train: {learning_rate: nan, max_steps: many, bf16: 'true', fp16: maybe}\n"
        "targets: {blocks: 3}\n",
    )
    found = problems_of(path)
    assert "expected a number, got 'nan' such as 0.001" in found["train.learning_rate"]
    assert "a whole number" in found["train.max_steps"]
    assert "without quotes" in found["train.bf16"]
    assert "true or false" in found["train.fp16"]
    assert "a list of numbers, got 3" in found["targets.blocks"]


@pytest.mark.parametrize(
    ("method", "key", "says"),
    [
        ("{name: full, density: 0.1}", "method.density", "it is a key of lora, meprop, "),
        (
            "{name: meprop, select: rows, rank: 2}",
            "method.rank",
            "it is a key of lora, sparsegrad, ",
        ),
        ("{name: meprop, unified: true}", "method.unified", "goes with method.select: rows"),
        ("{name: meprop, density: 0.1, entries: 5}", "method.density", "give one of the two"),
        ("{name: sparsegrad, form: rotated, rank: 3}", "method.rank", "rank is for form core"),
        ("{name: sparsegrad, state_capacity: 2}", "method.state_capacity", "support 'dynamic'"),
    ],
)
def test_a_key_that_the_method_lacks_is_reported_where_it_was_written(
    tmp_path: Path, method: str, key: str, says: str
) -> None:
    path = write(tmp_path, "r.yaml", f"seed: 1\nmethod: {method}\n")
    assert says in problems_of(path)[key] and "r.yaml:2" in problems_of(path)[key]
    typed = problems_of(write(tmp_path, "s.yaml", "method: lora\n"), f"method={method}")
    assert says in typed[key] and "command line" in typed[key]


def test_overrides_without_equals_or_with_bad_yaml_are_refused(tmp_path: Path) -> None:
    assert "not an override" in next(iter(problems_of(None, "seed").values()))
    assert "not valid YAML" in next(iter(problems_of(None, "seed=[1").values()))
    found = problems_of(None, "train.class_weights={neutral:3}")["train.class_weights"]
    assert "'neutral:3' lacks a space after the colon; write neutral: 3" in found
    broken = write(tmp_path, "b.yaml", "train:\n  a: [1\nseed: 1\n")
    text = next(iter(problems_of(broken).values()))
    assert "b.yaml:" in text and "not valid YAML" in text
    assert "no such file" in next(iter(problems_of(tmp_path / "missing.yaml").values()))
    twice = write(tmp_path, "t.yaml", "seed: 1\nseed: 2\n")
    assert "written twice" in problems_of(twice)["seed"]
    within = problems_of(None, "train.class_weights={good: 5, good: 6}")
    assert "written twice" in within["train.class_weights.good"]
    listing = write(tmp_path, "l.yaml", "- 1\n- 2\n")
    assert "mapping" in next(iter(problems_of(listing).values()))


def test_precedence_defaults_extends_recipe_command_line(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "train: {learning_rate: 1e-5, num_train_epochs: 7}\nseed: 1\n")
    child = write(tmp_path, "child.yaml", "extends: base.yaml\ntrain: {learning_rate: 2e-5}\n")
    recipe = load_recipe(child, ("seed=9",)).recipe
    assert (recipe.train.learning_rate, recipe.train.num_train_epochs, recipe.seed) == (2e-5, 7, 9)
    assert recipe.train.per_device_eval_batch_size == 64
    loaded = load_recipe(child, ("seed=9",))
    assert loaded.where("train.num_train_epochs").startswith("base.yaml:1")
    assert loaded.where("train.learning_rate").endswith("child.yaml:2: train.learning_rate")


def test_extends_in_a_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    b = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "cycle" in problems_of(b)["extends"]


def test_tuned_values_follow_the_task_unless_overridden(tmp_path: Path) -> None:
    name = "configs/roberta_glue.yaml"
    assert load_recipe(name).recipe.train.learning_rate == 3.05e-5
    cola = load_recipe(name, ("task.name=glue/cola",)).recipe.train
    assert (cola.learning_rate, cola.per_device_train_batch_size) == (1.01e-5, 16)
    assert load_recipe(name, ("task.name=glue/mnli",)).recipe.train.eval_steps == 10000
    mine = load_recipe(name, ("task.name=glue/cola", "train.learning_rate=1")).recipe.train
    assert (mine.learning_rate, mine.per_device_train_batch_size) == (1, 16)
    child = write(tmp_path, "c.yaml", f"extends: {name}\ntrain: {{learning_rate: 5e-5}}\n")
    assert load_recipe(child).recipe.train.learning_rate == 5e-5
    large = load_recipe("configs/roberta_large_glue.yaml", ("task.name=glue/stsb",)).recipe.train
    assert large.learning_rate == 7.71e-5
    bert = load_recipe("configs/bert_glue.yaml", ("task.name=glue/qnli",)).recipe.train
    assert (bert.learning_rate, bert.per_device_train_batch_size) == (1.94e-5, 16)


def test_another_method_drops_inherited_settings() -> None:
    recipe = load_recipe(None, ("method.name=lora", "method.rank=4")).recipe
    assert isinstance(recipe.method, LoraSettings)
    assert (recipe.method.rank, recipe.method.density) == (4, None)
    meprop = load_recipe(None, ("method.density=0.03", "method.name=meprop")).recipe
    assert meprop.method.model_dump()["density"] == 0.03


def test_resolved_recipe_reads_back_equal_and_digest_ignores_output_dir(tmp_path: Path) -> None:
    recipe = load_recipe("configs/bert_glue.yaml", ("output_dir=runs/x",)).recipe
    path = write(tmp_path, "resolved.yaml", to_yaml(recipe))
    again = load_recipe(path).recipe
    assert again == recipe and digest(again) == digest(recipe)
    assert digest(load_recipe(path, ("output_dir=runs/y",)).recipe) == digest(recipe)
    assert digest(load_recipe(path, ("seed=7",)).recipe) != digest(recipe)


def test_paths_in_a_recipe_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path, "r.yaml", "task: {name: glue/rte, path: data}\n")
    monkeypatch.chdir(REPO)
    assert load_recipe(path).recipe.task.path == str(tmp_path / "data")


def test_recipe_is_frozen() -> None:
    recipe = load_recipe(None).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    assert recipe.seed == 42


def test_loading_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from sparsegrad_cli.recipe.load_recipe import load_recipe\n"
        "from sparsegrad_cli.recipe.study import load_study\n"
        "import sparsegrad_cli.cli.app\n"
        "load_recipe(None); load_study('recipes/quickstart.yaml')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'matplotlib', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.strip() == "[]", done.stderr


# The core form's calibration before its defaults changed; a run's own recipe.yaml names them.
EARLIER = ("calibration.steps=16", "calibration.source=token")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (EARLIER, "cc470c07aa5f416e"),
        (("method=lora",), "aa2624f67fc2f783"),
        (("method=meprop",), "2476ed246bbb0be4"),
        (("method=full",), "ad7c7d5415d1c6ff"),
        (("method.form=rotated", "calibration.steps=16"), "db902af047c3e398"),
        ((*EARLIER, "task.name=builtin:dialogues", "model=builtin:smollm2"), "a85ceecdc78191e3"),
        (
            (*EARLIER, "task.name=csv", "task.path=/data", "task.columns.text=body"),
            "753d40da9d70e2de",
        ),
    ],
)
def test_recipes_keep_the_digest_of_earlier_versions(
    overrides: tuple[str, ...], expected: str
) -> None:
    """Otherwise their runs could not be resumed. A key that was added counts only if it is set."""
    assert digest(load_recipe(None, overrides, data=False).recipe).startswith(expected)


@pytest.mark.parametrize(
    "setting",
    [
        "optim=sgd",
        "head_learning_rate=0.1",
        "lora_plus_ratio=16",
        "adam_beta1=0.8",
        "class_weights=balanced",
    ],
)
def test_settings_of_the_optimizer_are_part_of_the_digest(setting: str) -> None:
    plain = load_recipe(None, ("method=lora",)).recipe
    assert digest(load_recipe(None, ("method=lora", f"train.{setting}")).recipe) != digest(plain)
