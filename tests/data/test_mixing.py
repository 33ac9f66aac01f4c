"""Mixtures of several sources, and further evaluation sets: what is read, taken and recorded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from support.cli_runs import Cli
from support.task_data import load_task

from sparsegrad_cli.data.load_task import load_chat
from sparsegrad_cli.data.mixing import Until, mix
from sparsegrad_cli.errors import DataError, RecipeError, UsageError
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.recipe.task_section import SourceSection, TaskSection


def counts(weights: tuple[float, ...], sizes: tuple[int, ...], until: Until) -> list[int]:
    names = [str(number) for number in range(len(sizes))]
    taken = Counter(source for source, _ in mix(names, weights, sizes, until).rows)
    return [taken[number] for number in range(len(sizes))]


@pytest.mark.parametrize(
    ("weights", "sizes", "until", "expected"),
    [
        # 3 : 1 of 300 and 1000 rows: the first source is taken whole, and a third of it beside.
        ((3, 1), (300, 1000), "first_exhausted", [300, 100]),
        ((0.75, 0.25), (300, 1000), "first_exhausted", [300, 100]),
        # Every row of the second source, and three times as many of the first, which repeats.
        ((3, 1), (300, 1000), "all_exhausted", [3000, 1000]),
        ((1, 1, 2), (10, 20, 1000), "first_exhausted", [10, 10, 20]),
        ((1, 1, 2), (10, 20, 100), "all_exhausted", [50, 50, 100]),
        # A source is never left out, however small its weight.
        ((1e-6, 1), (5, 5), "first_exhausted", [1, 5]),
    ],
)
def test_rows_are_in_proportion_to_the_weights(
    weights: tuple[float, ...], sizes: tuple[int, ...], until: Until, expected: list[int]
) -> None:
    assert counts(weights, sizes, until) == expected


def test_a_row_is_repeated_only_after_all_others_of_its_source() -> None:
    rows = mix("ab", (1, 1), (4, 10), "all_exhausted").rows
    times = Counter(rows)
    assert {times[1, row] for row in range(10)} == {1}
    assert sorted(times[0, row] for row in range(4)) == [2, 2, 3, 3]
    unique = mix("ab", (1, 1), (4, 10), "first_exhausted").rows
    assert len(set(unique)) == len(unique) == 8


def test_rows_that_the_weights_leave_out_are_counted_in_a_note() -> None:
    assert mix("ab", (3, 1), (300, 100), "first_exhausted").notes("rows") == []
    assert mix("ab", (3, 1), (300, 1000), "all_exhausted").notes("rows") == []
    (some,) = mix("ab", (1, 1), (1000, 1500), "first_exhausted").notes("rows")
    assert some == (
        "the weights of task.mix take 2,000 of 2,500 training rows (a 1,000 of 1,000, b 1,000 of "
        "1,500); task.mix_until: all_exhausted takes all of them"
    )
    (most,) = mix("ab", (1, 1), (216, 1), "first_exhausted").notes("rows")
    assert most.startswith("MOST DATA IS LEFT OUT: the weights of task.mix take 2 of 217 ")


def test_the_mixture_is_the_same_in_every_run_and_interleaves_its_sources() -> None:
    one, other = (mix("ab", (1, 1), (100, 300), "first_exhausted") for _ in range(2))
    assert one == other
    # The first fifty of two hundred hold 25 of each source, give or take 4 standard deviations.
    first = Counter(source for source, _ in one.rows[:50])
    assert abs(first[0] - 25) <= 4 * 3.1
    joined = [f"a{row}" for row in range(100)] + [f"b{row}" for row in range(300)]
    assert [joined[at] for at in one.positions] == [f"{'ab'[s]}{row}" for s, row in one.rows]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with two sources, one with its own validation part, and another file."""
    for name, count in (("big", 40), ("small", 10)):
        rows = [(f"{name} {n}", "yes" if n % 2 else "no") for n in range(count)]
        write_csv(tmp_path / name / "train.csv", rows)
    rows = [(f"held {n}", "yes" if n % 2 else "no") for n in range(6)]
    write_csv(tmp_path / "small" / "validation.csv", rows)
    rows = [(f"ood {n}", "no") for n in range(5)]
    write_csv(tmp_path / "other.csv", rows)
    return tmp_path


def sources(folder: Path) -> tuple[SourceSection, ...]:
    big = SourceSection(path=str(folder / "big" / "train.csv"), weight=3, name="big")
    return big, SourceSection(path=str(folder / "small"), weight=1)


def test_labelled_files_are_mixed_and_split_by_source(files: Path) -> None:
    found = load_task("csv", mix=sources(files), validation_fraction=0.25)
    origin = Counter(text.split()[0] for text in found.train["text"])
    # 30 of big are left to train on; at 3 : 1 they and the 10 of small are all taken.
    assert origin == {"big": 30, "small": 10}
    assert [source.model_dump() for source in found.sources] == [
        {"name": "big", "weight": 3.0, "rows": 30, "taken": 30},
        {"name": "small", "weight": 1.0, "rows": 10, "taken": 10},
    ]
    held_out = Counter(text.split()[0] for text in found.validation["validation"]["text"])
    assert held_out == {"big": 10, "held": 6}
    assert not set(found.train["text"]) & set(found.validation["validation"]["text"])


def test_the_note_on_left_out_rows_is_the_tasks(files: Path) -> None:
    found = load_task("csv", mix=sources(files), validation_fraction=0.5)
    assert any("take 27 of 30 training rows (big 20 of 20, " in note for note in found.notes)


def test_a_source_without_the_column_is_named(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps(chat)] * 3))
    mixed = tuple(SourceSection(path=str(tmp_path / name)) for name in ("a.jsonl", "chat.jsonl"))
    with pytest.raises(UsageError, match=r"no column 'text' for the text in .*chat\.jsonl"):
        load_task("json", mix=mixed)


def test_a_mixture_from_the_command_line_overrules_the_path_with_a_note(files: Path) -> None:
    recipe = files / "r.yaml"
    recipe.write_text(f"task: {{name: csv, path: {files / 'small'}}}\n")
    mixed = f"task.mix=[{files / 'small'}, {files / 'other.csv'}]"
    loaded = load_recipe(recipe, (mixed,))
    assert loaded.recipe.task.path is None
    assert loaded.notes == (
        f"task.path ({recipe}:1) has no effect: task.mix (command line) overrules it",
    )
    assert load_recipe(recipe).notes == ()


def test_a_bad_source_is_one_problem(files: Path) -> None:
    good = {"path": str(files / "small")}
    for bad, problem in (
        ({"path": str(files / "big"), "weight": -1}, "task.mix[1].weight"),
        ({"path": str(files / "big"), "name": ""}, "expected a text, got an empty one"),
    ):
        mixed = f"task.mix={json.dumps([good, bad])}"
        with pytest.raises(RecipeError) as caught:
            load_recipe(None, ("task=csv", mixed))
        assert len(caught.value.problems) == 1 and problem in str(caught.value)
    with pytest.raises(RecipeError, match="at least 2 values, got 1"):
        load_recipe(None, ("task=csv", f"task.mix={json.dumps([good])}"))


def test_a_limit_counts_the_rows_that_are_left(files: Path) -> None:
    found = load_task("csv", mix=sources(files), validation_fraction=0.25, train_limit=20)
    taken = [source.taken for source in found.sources]
    assert sum(taken) == 20 and min(taken) > 0
    origin = Counter(text.split()[0] for text in found.train["text"])
    assert taken == [origin["big"], origin["small"]]


def test_a_single_source_reads_as_before(files: Path) -> None:
    plain = load_task("csv", path=files / "small")
    assert plain.sources == () and list(plain.validation) == ["validation"]
    assert plain.train["text"][:2] == ["small 0", "small 1"]


def test_evaluation_sets_are_named_and_keep_the_selecting_set_first(files: Path) -> None:
    found = load_task("csv", path=files / "small", evaluation={"ood": str(files / "other.csv")})
    assert {name: len(data) for name, data in found.validation.items()} == {
        "validation": 6,
        "ood": 5,
    }
    assert next(iter(found.validation)) == "validation"
    plain = load_task("csv", path=files / "small")
    assert found.majority == plain.majority and found.data_hash != plain.data_hash
    limited = load_task(
        "csv", path=files / "small", evaluation={"ood": str(files / "other.csv")}, eval_limit=2
    )
    assert [len(data) for data in limited.validation.values()] == [2, 2]


def test_a_label_that_training_lacks_is_refused_in_an_evaluation_set(files: Path) -> None:
    write_csv(files / "wrong.csv", [("x", "maybe")])
    with pytest.raises(DataError, match="maybe") as refused:
        load_task("csv", path=files / "small", evaluation={"ood": str(files / "wrong.csv")})
    assert "wrong.csv" in str(refused.value.where)


def write_chat(path: Path, word: str, count: int) -> Path:
    rows = [{"prompt": f"{word} {n}?", "completion": f"{word}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conversations_are_mixed_and_evaluated(tmp_path: Path) -> None:
    one, two = (
        write_chat(tmp_path / "one.jsonl", "one", 30),
        write_chat(tmp_path / "two.jsonl", "two", 60),
    )
    three = write_chat(tmp_path / "three.jsonl", "three", 4)
    mixed = (SourceSection(path=str(one)), SourceSection(path=str(two), weight=2))
    task = TaskSection(name="chat", mix=mixed, evaluation={"third": str(three)})
    found = load_chat(task)
    assert found.mixture is not None
    origin = Counter(each.turns[0].text.split()[0] for each in found.train)
    sizes = dict(zip(found.mixture.names, found.mixture.sizes, strict=True))
    ratio = min(sizes["one"], sizes["two"] / 2)
    assert origin == {"one": round(ratio), "two": round(2 * ratio)}
    taken = {source.name: source.taken for source in found.mixture.sources(range(len(found.train)))}
    assert taken == origin
    assert [each.turns[0].text for each in found.evaluation["third"]] == [
        f"three {n}?" for n in range(4)
    ]
    assert found.counts["rows read"] == 90 and found.counts["third conversations"] == 4
    plain = load_chat(TaskSection(name="chat", mix=mixed))
    assert plain.data_hash != found.data_hash


# --- the recipe


def recipe_file(folder: Path, task: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(f"task: {{name: csv, {task}}}\n")
    return path


def test_paths_are_relative_to_the_recipe(files: Path) -> None:
    found = load_recipe(
        recipe_file(
            files, "mix: [big/train.csv, {path: small, weight: 2}], evaluation: {ood: other.csv}"
        )
    ).recipe.task
    assert found.train_paths == (str(files / "big/train.csv"), str(files / "small"))
    assert [source.label for source in found.mix or ()] == ["train", "small"]
    assert found.evaluation == {"ood": str(files / "other.csv")}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("path: small, mix: [small, big/train.csv]", "path exclude each other"),
        ("mix: [small]", "at least 2"),
        ("mix: [small, {path: small, weight: 2}]", "names two sources 'small'"),
        ("mix: [small, gone.csv]", "no such file or folder: "),
        ("mix: [small, {path: big/train.csv, weight: 0}]", "greater than 0"),
        ("path: small, mix_until: all_exhausted", "there is no task.mix"),
        ("path: small, evaluation: {ood: gone.csv}", "no such file: "),
        ("path: small, evaluation: {validation: other.csv}", "is taken by the task's own data"),
        ("path: small, evaluation: {'a b': other.csv}", "letters, digits and _"),
        ("path: small, evaluation: {}", "names no file"),
    ],
)
def test_mixtures_and_sets_that_cannot_be_read_are_refused(
    files: Path, task: str, message: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe_file(files, task))
    assert message in " ".join(problem.what for problem in refused.value.problems)


def test_tasks_without_files_have_no_mixture(cli: Cli, files: Path) -> None:
    mixture = f"task.mix=[{files / 'small'},{files / 'big/train.csv'}]"
    for setting in (mixture, f"task.evaluation={{ood: {files / 'other.csv'}}}"):
        refused = cli("validate", setting)
        assert refused.code == 2 and "not for builtin:acceptability" in refused.flat


def test_validate_reads_the_sources_and_the_sets(cli: Cli, files: Path) -> None:
    write_csv(files / "wrong.csv", [("x", "maybe")])
    task = f"path: {files / 'small'}, evaluation: {{ood: {files / 'wrong.csv'}}}"
    refused = cli("validate", str(recipe_file(files, task)))
    assert refused.code == 2 and "maybe" in refused.flat
    with pytest.raises(UsageError, match="no column 'text'"):
        (files / "odd.csv").write_text("body,label\nx,no\n")
        load_task("csv", path=files / "small", evaluation={"ood": str(files / "odd.csv")})


def test_a_recipe_without_a_mixture_keeps_its_digest(files: Path) -> None:
    plain = load_recipe(recipe_file(files, "path: small")).recipe
    changed = plain.task.model_copy(update={"evaluation": {"ood": str(files / "other.csv")}})
    assert digest(plain.model_copy(update={"task": changed})) != digest(plain)
