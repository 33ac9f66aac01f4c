"""Every accepted setting has an effect, or is refused with the reason and the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli_runs import Cli
from support.small_runs import base_folder, data_folder

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.recipe.effects import idle_settings
from sparsegrad_cli.recipe.load_recipe import load_recipe, to_yaml
from sparsegrad_cli.recipe.study import load_study, make_study

LORA = "method: {name: lora}\n"
CHAT = "task: {name: chat, path: d.jsonl}\nmodel: builtin:smollm2\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    (folder / "d.jsonl").write_text("{}\n")
    (folder / "d.csv").write_text("text,label\na,b\n")
    (folder / "b.safetensors").write_text("")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> dict[str, Problem]:
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        return {problem.key: problem for problem in error.problems}
    return {}


IDLE = [
    ("model: {name: 'builtin:minilm', revision: main}\n", "model.revision"),
    ("model: {name: 'builtin:minilm', trust_remote_code: true}\n", "model.trust_remote_code"),
    ("model: {name: ., revision: main}\n", "model.revision"),
    ("task: {name: 'builtin:acceptability', path: d.csv}\n", "task.path"),
    ("task: {name: glue/rte, columns: {text: a}}\n", "task.columns"),
    ("task: {name: glue/rte, validation_fraction: 0.2}\n", "task.validation_fraction"),
    ("task: {name: glue/rte, chat: {packing: pack}}\n", "task.chat"),
    ("task: {name: csv, path: d.csv, chat: {}}\n", "task.chat"),
    ("task: {name: json, path: d.csv, separator: ';'}\n", "task.separator"),
    ("task: {name: glue/rte, label_separator: ';'}\n", "task.label_separator"),
    ("task: {name: builtin:dialogues, label_separator: ';'}\n", "task.label_separator"),
    (CHAT.replace("jsonl}", "jsonl, columns: {text: a}}"), "task.columns"),
    (CHAT.replace("jsonl}", "jsonl, holdout: 9}"), "task.holdout"),
    (CHAT.replace("jsonl}", "jsonl, chat: {paths: best}}"), "task.chat.paths"),
    (CHAT.replace("jsonl}", "jsonl, chat: {max_rank: 0}}"), "task.chat.max_rank"),
    (CHAT.replace("jsonl}", "jsonl, chat: {config: a}}"), "task.chat.config"),
    (
        CHAT.replace("jsonl}", "jsonl, validation_fraction: 0.2, chat: {split: source}}"),
        "task.validation_fraction",
    ),
    ("match: trainable\n", "match"),
    ("method: {support: dense, rank: 8, density: 0.02}\n", "method.density"),
    ("method: {support: dense, rank: 8, entries: 100}\n", "method.entries"),
    (LORA + "calibration: {steps: 8}\n", "calibration.steps"),
    ("method: full\ncalibration: {basis: b.safetensors}\n", "calibration.basis"),
    ("method: meprop\ncalibration: {warmup_steps: 3}\n", "calibration.warmup_steps"),
    ("calibration: {basis: b.safetensors, steps: 8}\n", "calibration.steps"),
    ("calibration: {basis: b.safetensors, source: batch}\n", "calibration.source"),
    ("calibration: {basis: b.safetensors, basis_per: kind}\n", "calibration.basis_per"),
    ("calibration: {basis: b.safetensors, score: square}\n", "calibration.score"),
    ("calibration: {basis: b.safetensors, warmup_steps: 9}\n", "calibration.warmup_steps"),
    ("calibration: {source: random, steps: 8}\n", "calibration.steps"),
    ("calibration: {source: original, batch_size: 8}\n", "calibration.batch_size"),
    ("calibration: {source: original, select: maxvol}\n", "calibration.select"),
    ("calibration: {basis: b.safetensors, select: maxvol}\n", "calibration.select"),
    (LORA + "calibration: {select: maxvol}\n", "calibration.select"),
    ("calibration: {decomposition: exact, power_steps: 1}\n", "calibration.power_steps"),
    ("calibration: {warmup_steps: 0, keep_head: true}\n", "calibration.keep_head"),
    (
        "calibration: {warmup_steps: 0, warmup_learning_rate: 0.1}\n",
        "calibration.warmup_learning_rate",
    ),
    (CHAT + "calibration: {warmup_steps: 9}\n", "calibration.warmup_steps"),
    ("method: {support: dynamic}\ncalibration: {score: square}\n", "calibration.score"),
    ("method: {form: rotated}\ncalibration: {score: square}\n", "calibration.score"),
    ("train: {eval_steps: 9}\n", "train.eval_steps"),
    ("train: {eval_strategy: no, eval_steps: 9}\n", "train.eval_steps"),
    ("train: {save_steps: 9}\n", "train.save_steps"),
    ("train: {save_strategy: best, save_steps: 9}\n", "train.save_steps"),
    ("train: {save_strategy: no, save_total_limit: 3}\n", "train.save_total_limit"),
    ("train: {eval_strategy: no, load_best_model_at_end: true}\n", "train.load_best_model_at_end"),
    ("train: {save_strategy: no, load_best_model_at_end: true}\n", "train.load_best_model_at_end"),
    ("train: {eval_strategy: no, early_stopping_patience: 2}\n", "train.early_stopping_patience"),
    ("train: {max_steps: 5, num_train_epochs: 2}\n", "train.num_train_epochs"),
    (CHAT + "train: {loss_buckets: 9}\n", "train.loss_buckets"),
    (CHAT + "train: {loss: full, loss_mix: false}\n", "train.loss_mix"),
    (CHAT + "train: {loss: rece, loss_bucket_positions: 9}\n", "train.loss_bucket_positions"),
    (CHAT + "train: {loss: rece, loss_bucket_classes: 9}\n", "train.loss_bucket_classes"),
    (CHAT + "train: {loss: sce, loss_neighbours: 0}\n", "train.loss_neighbours"),
    (CHAT + "train: {loss: sce, loss_rounds: 2}\n", "train.loss_rounds"),
    (CHAT + "train: {unpadded: true}\n", "train.unpadded"),
    ("train: {torch_compile: true, unpadded: true}\n", "train.unpadded"),
]


@pytest.mark.parametrize(("text", "key"), IDLE)
def test_a_setting_that_another_one_disables_is_refused(
    tmp_path: Path, text: str, key: str
) -> None:
    path = write(tmp_path, text)
    found = problems(path)
    assert list(found) == [key]
    problem = found[key]
    assert problem.what.startswith("has no effect: ") and problem.fix
    assert (problem.file, problem.line) == (
        str(path),
        1 + text.count("\n", 0, text.rindex(key[-4:])),
    )


@pytest.mark.parametrize(
    ("base", "over", "key", "value"),
    [
        (
            "train: {eval_strategy: steps, eval_steps: 9}\n",
            "train.eval_strategy=no",
            "eval_steps",
            None,
        ),
        ("train: {num_train_epochs: 7}\n", "train.max_steps=5", "num_train_epochs", 3.0),
        (
            "train: {early_stopping_patience: 2, load_best_model_at_end: true}\n",
            "train.eval_strategy=no",
            "early_stopping_patience",
            None,
        ),
    ],
)
def test_a_setting_disabled_by_a_stronger_one_is_reset(
    tmp_path: Path, base: str, over: str, key: str, value: object
) -> None:
    path = write(tmp_path, base)
    loaded = load_recipe(path, (over,))
    assert getattr(loaded.recipe.train, key) == value
    assert any(f"train.{key} ({path}:1) has no effect" in note for note in loaded.notes)
    # The same between files.
    name, _, setting = over.partition("=")
    section, _, short = name.partition(".")
    child = write(tmp_path, f"extends: r.yaml\n{section}: {{{short}: {setting}}}\n", "child.yaml")
    assert load_recipe(child).recipe == loaded.recipe
    # An override without effect is refused, because it is stronger than the file.
    assert f"train.{key}" in problems(child, f"train.{key}=4")
    # The resolved recipe says what runs, and reads back.
    again = write(tmp_path, to_yaml(loaded.recipe), "again.yaml")
    assert load_recipe(again).recipe == loaded.recipe


def test_the_recipe_of_a_finished_run_is_accepted_unchanged(tmp_path: Path) -> None:
    """A run of an earlier version may have kept settings that had no effect."""
    text = "method: lora\ncalibration: {steps: 9}\ntrain: {eval_strategy: no, eval_steps: 7}\n"
    path = write(tmp_path, text, "recipe.yaml")
    assert set(problems(path)) == {"calibration.steps", "train.eval_steps"}
    (tmp_path / "run.json").write_text("{}")
    found = load_recipe(path).recipe
    assert (found.calibration.steps, found.train.eval_steps) == (9, 7)
    assert make_study(str(tmp_path), ("lora", "full"), 1, ()).cells
    assert set(problems(path, "train.save_steps=3")) == {"train.save_steps"}


@pytest.mark.parametrize(
    ("text", "override", "why"),
    [
        (CHAT, "train.unpadded=true", "it is for encoders"),
        (
            "train: {unpadded: true}\n",
            "train.torch_compile=true",
            "compiled models compute padding",
        ),
    ],
)
def test_padding_is_computed_anyway(tmp_path: Path, text: str, override: str, why: str) -> None:
    path = write(tmp_path, text)
    loaded = load_recipe(path, (override,))
    (note,) = loaded.notes
    assert note.startswith("train.unpadded (") and f") has no effect: {why}" in note
    assert not loaded.recipe.train.unpadded
    again = write(tmp_path, to_yaml(loaded.recipe), "again.yaml")
    assert load_recipe(again).recipe == loaded.recipe and not load_recipe(again).notes


def test_another_method_or_task_drops_settings_of_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, "calibration: {steps: 9, keep_head: true}\n")
    loaded = load_recipe(path, ("method=lora",))
    assert loaded.recipe.calibration.steps == 32 and len(loaded.notes) == 2
    # Methods share the section, so the command line may set it for all of them.
    loaded = load_recipe(None, ("method=lora", "calibration.steps=3"))
    assert [note for note in loaded.notes if "command line" in note] == [
        "calibration.steps (command line) has no effect: lora does not calibrate"
    ]
    path = write(tmp_path, CHAT.replace("jsonl}", "jsonl, chat: {packing: pack}}"))
    loaded = load_recipe(path, ("task={name: csv, path: d.csv}", f"task.path={tmp_path / 'd.csv'}"))
    assert loaded.recipe.task.chat is None


def test_shipped_recipes_stay_usable_with_overrides() -> None:
    for overrides in (
        ("method=lora",),
        ("method=full", "train.max_steps=4"),
        ("train.eval_strategy=no",),
        ("train.save_strategy=no",),
        ("method={name: sparsegrad, form: core, support: dense, rank: 8}",),
        ("train.warmup_steps=0", "train.lr_scheduler_type=constant"),
    ):
        for name in ("quickstart", "bert_glue", "smollm2_dialogues"):
            loaded = load_recipe(name, overrides)
            assert not list(idle_settings(loaded.recipe)), (name, overrides)


@pytest.mark.parametrize(
    ("train", "scheduler", "steps"),
    [
        ("{}", "constant", 0),
        ("{warmup_steps: 5}", "constant_with_warmup", 5),
        ("{warmup_steps: 0.06}", "constant_with_warmup", 0.06),
        ("{warmup_ratio: 0.06}", "constant_with_warmup", 0.06),
        ("{lr_scheduler_type: constant, warmup_steps: 5}", "constant_with_warmup", 5),
        ("{lr_scheduler_type: constant_with_warmup, warmup_steps: 0}", "constant", 0),
        ("{lr_scheduler_type: cosine, warmup_ratio: 0.1}", "cosine", 0.1),
        ("{warmup_ratio: 0}", "constant", 0),
    ],
)
def test_a_warm_up_selects_its_scheduler(
    tmp_path: Path, train: str, scheduler: str, steps: float
) -> None:
    found = load_recipe(write(tmp_path, f"train: {train}\n")).recipe.train
    assert (found.lr_scheduler_type, found.warmup_steps) == (scheduler, steps)


@pytest.mark.parametrize(
    ("train", "key", "said"),
    [
        ("{warmup_ratio: 0.1, warmup_steps: 5}", "train.warmup_ratio", "another name"),
        ("{warmup_ratio: 1.0}", "train.warmup_ratio", "share of all steps"),
        ("{warmup_ratio: many}", "train.warmup_ratio", "share of all steps"),
        ("{warmup_steps: 2.5}", "train.warmup_steps", "2.5 is not a share"),
        ("{lr_scheduler_type: constant_with_warmup}", "train.lr_scheduler_type", "needs"),
    ],
)
def test_an_invalid_warm_up_is_refused(tmp_path: Path, train: str, key: str, said: str) -> None:
    path = write(tmp_path, f"seed: 1\ntrain: {train}\n")
    problem = problems(path)[key]
    assert said in problem.what and (problem.file, problem.line) == (str(path), 2)


def test_either_warm_up_key_overrides_the_other(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {warmup_steps: 50}\n")
    assert load_recipe(path, ("train.warmup_ratio=0.1",)).recipe.train.warmup_steps == 0.1
    path = write(tmp_path, "train: {warmup_ratio: 0.1}\n")
    assert load_recipe(path, ("train.warmup_steps=7",)).recipe.train.warmup_steps == 7
    both = problems(path, "train.warmup_ratio=0.2", "train.warmup_steps=7")
    assert "train.warmup_steps: command line" in both["train.warmup_ratio"].what


def test_a_run_has_the_rates_of_constant_with_warmup(cli: Cli, tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    data_folder(tmp_path / "data")
    recipe = (
        "model: base\ntask: {name: csv, path: data, max_length: 16}\nmethod: full\n"
        "train: {max_steps: 7, per_device_train_batch_size: 4, logging_steps: 1, use_cpu: true,\n"
        "  eval_strategy: no}\n"
    )
    (tmp_path / "r.yaml").write_text(recipe)
    outcome = cli("train", "r.yaml", "train.warmup_steps=5", "-o", "run", "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    rates = [entry["learning_rate"] for entry in record["metrics"]["train"]]
    assert rates == pytest.approx([0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001, 0.001])
    assert "lr_scheduler_type: constant_with_warmup" in Path("run/recipe.yaml").read_text()


# --- match


@pytest.mark.parametrize("text", ["null", "none", "'null'"])
def test_match_accepts_none_and_null(tmp_path: Path, text: str) -> None:
    recipe = write(tmp_path, f"method: {{name: lora, rank: 4}}\nmatch: {text}\n")
    study = write(tmp_path, f"methods: [lora, full]\nmatch: {text}\n", "s.yaml")
    assert load_study(study).study.match is None
    if text == "'null'":
        return  # only the command line has this spelling
    assert load_recipe(recipe).recipe.match is None
    assert load_recipe(recipe, (f"match={text}",)).recipe.match is None
    for found in (
        make_study(None, ("lora", "full"), 1, (f"match={text}",)),
        make_study(None, ("lora", "full"), 1, (), match=text),
        load_study(write(tmp_path, "methods: [lora]\n", "t.yaml"), (f"match={text}",)),
    ):
        assert found.study.match is None
        assert found.cells[0].loaded.recipe.match is None


def test_match_as_an_override_sets_the_comparisons_match(tmp_path: Path) -> None:
    assert make_study(None, ("lora",), 1, ("match=trainable=70k",)).study.match == "trainable=70k"
    with pytest.raises(RecipeError, match="is given twice, here and as --match none"):
        make_study(None, ("lora",), 1, ("match=trainable",), match="none")
    with pytest.raises(RecipeError, match="is not a budget"):
        make_study(None, ("lora",), 1, ("match=entries",))
    for key in ("match: null", "seed: 3", "output_dir: x"):
        path = write(tmp_path, f"methods: [lora]\nsettings:\n  {key}\n", "s.yaml")
        with pytest.raises(RecipeError) as caught:
            load_study(path)
        (problem,) = caught.value.problems
        assert (problem.key, problem.line) == (f"settings.{key.split(':')[0]}", 3)


@pytest.mark.parametrize(
    ("text", "key", "line", "others"),
    [
        ("method:\n  name: lora\n  rank: 8\n  density: 0.01\n", "method.rank", 3, ("density", 4)),
        (
            "match: trainable\nmethod:\n  name: lora\n  rank: 8\n",
            "method.rank",
            4,
            ("match", 1),
        ),
        ("method:\n  name: lora\n  density: 0.01\n", "method.density", 3, None),
        ("method: lora\nmatch: trainable\n", "match", 2, None),
    ],
)
def test_rank_and_density_together_are_refused_with_keys_and_lines(
    tmp_path: Path, text: str, key: str, line: int, others: tuple[str, int] | None
) -> None:
    path = write(tmp_path, text)
    problem = problems(path)[key]
    assert (problem.file, problem.line) == (str(path), line) and problem.fix
    if others is not None:
        assert f"{others[0]}: {path}:{others[1]}" in problem.what


def test_a_row_with_rank_and_density_is_refused_with_its_lines(tmp_path: Path) -> None:
    text = "methods:\n  - full\n  - method:\n      name: lora\n      rank: 8\n      density: 0.01\n"
    path = write(tmp_path, text, "s.yaml")
    with pytest.raises(RecipeError) as caught:
        load_study(path)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key, problem.line) == (str(path), "method.rank", 5)
    assert f"method.density: {path}:6" in problem.what


def test_the_stronger_of_rank_and_density_is_used(tmp_path: Path) -> None:
    path = write(tmp_path, "method: {name: lora, rank: 8}\n")
    found = load_recipe(path, ("match=trainable", "method.density=0.02")).recipe.method
    assert found.model_dump()["rank"] is None
    path = write(tmp_path, "match: trainable\nmethod: {name: lora, density: 0.02}\n")
    found = load_recipe(path, ("match=none", "method.rank=3")).recipe.method
    assert found.model_dump()["density"] is None
    both = problems(path, "method.rank=3", "method.density=0.1")
    assert "method.density: command line" in both["method.rank"].what


# --- studies and commands


def test_a_setting_without_effect_in_any_run_is_refused(tmp_path: Path) -> None:
    text = "methods: [lora, full]\nsettings:\n  calibration:\n    steps: 9\n"
    path = write(tmp_path, text, "s.yaml")
    with pytest.raises(RecipeError) as caught:
        load_study(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == ("calibration.steps", 4)
    assert load_study(write(tmp_path, text.replace("full", "sparsegrad"), "s.yaml"))
    (note,) = make_study(None, ("lora", "full"), 1, ("calibration.steps=9",)).notes
    assert note.startswith("calibration.steps (command line) has no effect")
    assert not make_study(None, ("lora", "sparsegrad"), 1, ("calibration.steps=9",)).notes
    with pytest.raises(RecipeError, match=r"train\.eval_steps: has no effect"):
        make_study(None, ("lora", "full"), 1, ("train.eval_steps=9",))
    text = "methods:\n  - {method: lora, calibration: {steps: 9}}\n  - sparsegrad\n"
    with pytest.raises(RecipeError, match=r"s\.yaml:2: calibration\.steps: has no effect"):
        load_study(write(tmp_path, text, "s.yaml"))
    with pytest.raises(RecipeError, match="no row is matched"):
        load_study(
            write(tmp_path, "methods: [{method: full, matched: false}]\nmatch: null\n", "s.yaml")
        )


def test_settings_for_an_unknown_task_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "task: glue/rte\nper_task:\n  glue/ret: {seed: 3}\n")
    problem = problems(path)["per_task.glue/ret"]
    assert problem.line == 3 and str(problem.fix).startswith("did you mean glue/rte?")


def test_tuning_refuses_one_weight_decay_for_both_kinds_of_methods(tmp_path: Path) -> None:
    decay = ("train.weight_decay=0.1",)
    with pytest.raises(RecipeError, match=r"train\.weight_decay: 0\.1 is shared by full, .* lora"):
        make_study(None, ("full", "lora"), 1, decay, trials=3)
    make_study(None, ("full", "lora"), 1, decay)
    make_study(None, ("full", "meprop"), 1, decay, trials=3)
    make_study(None, ("sparsegrad", "lora"), 1, decay, trials=3)
    text = "methods: [full, lora]\nsettings: {train: {weight_decay: 0.1}}\ntune: TUNE\n"
    tuned = write(tmp_path, text.replace("TUNE", "{space: {weight_decay: [0, 0.1]}}"), "s.yaml")
    load_study(tuned)
    with pytest.raises(RecipeError, match="weight_decay"):
        load_study(write(tmp_path, text.replace("TUNE", "3"), "s.yaml"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("compare", "--methods", "full,lora", "--device", "cpu"), "--device has no effect"),
        (("estimate", "--overhead", "1GiB"), "--overhead has no effect"),
        (("generate", "builtin:smollm2", "-p", "a", "--top-p", "0.9"), "--top-p has no effect"),
        (("generate", "builtin:smollm2", "-p", "a", "--seed", "3"), "--seed has no effect"),
        (("calibrate", "method=lora"), "calibrate makes a basis, and method lora needs none"),
    ],
)
def test_an_option_without_effect_is_refused(cli: Cli, command: tuple[str, ...], said: str) -> None:
    outcome = cli(*command)
    assert outcome.code == 2 and said in outcome.flat


def test_validate_notes_overruled_settings(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("validate", "train.max_steps=5")
    assert outcome.code == 0
    assert (
        "# note: train.num_train_epochs (configs/quickstart.yaml:10) has no effect" in outcome.out
    )
    write(tmp_path, "methods: [full, lora]\n", "s.yaml")
    outcome = cli("validate", "s.yaml", "--json")
    assert [cell["method"]["name"] for cell in json.loads(outcome.out)["cells"]][:2] == [
        "full",
        "lora",
    ]


def test_validation_fraction_is_refused_if_the_data_has_a_validation_part(
    cli: Cli, tmp_path: Path
) -> None:
    data_folder(tmp_path / "data")
    base_folder(tmp_path / "base")
    split = ("task={name: csv, path: data}", "task.validation_fraction=0.2")
    outcome = cli("train", "model=base", "method=full", *split)
    assert outcome.code == 2 and "validation_fraction 0.2 has no effect" in outcome.flat
    line = '{"prompt": "a?", "completion": "b"}\n'
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(line * 3)
    split = ("task={name: chat, path: .}", "task.validation_fraction=0.2")
    outcome = cli("train", "model=base", "method=full", *split)
    assert outcome.code == 2 and "validation_fraction 0.2 has no effect" in outcome.flat


def test_gradient_checkpointing_is_refused_if_the_model_lacks_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    data_folder(tmp_path / "data")
    base_folder(tmp_path / "base")
    task = "task={name: csv, path: data, max_length: 16}"
    outcome = cli("train", "model=base", task, "method=full", "train.gradient_checkpointing=true")
    assert outcome.code == 2
    assert "BertForSequenceClassification does not support gradient checkpointing" in outcome.flat
