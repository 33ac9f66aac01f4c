"""`sparsegrad init`: unlike data files, each with the recipe that fits."""

from __future__ import annotations

import csv
import json
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_runs import Cli
from support.small_runs import base_folder

from sparsegrad_cli.recipe.load_recipe import load_recipe

_WORDS = (
    *("the", "film", "was", "a", "great", "joy", "to", "watch", "and", "I", "loved", "every"),
    *("minute", "of", "it", "but", "not", "end"),
)


def text(draw: random.Random, words: int = 9) -> str:
    return " ".join(draw.choices(_WORDS, k=words))


def write(path: Path, header: list[str], rows: list[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ids(d: random.Random, p: Path) -> None:
    write(p, ["id", "review", "sentiment"], [(i, text(d), d.choice(["a", "b"])) for i in range(90)])


def dates(d: random.Random, p: Path) -> None:
    rows = [(f"2024-01-{i % 28 + 1:02}", f"u{i % 37}", text(d), i % 5 + 1) for i in range(90)]
    write(p, ["date", "user", "comment", "stars"], rows)


def several_texts(d: random.Random, p: Path) -> None:
    rows = [(uuid.UUID(int=i), text(d, 4), text(d, 40), d.choice("abc")) for i in range(60)]
    write(p, ["uid", "title", "body", "category"], rows)


def scores(d: random.Random, p: Path) -> None:
    write(p, ["text", "score"], [(text(d), f"{5 * d.random():.2f}") for _ in range(90)])


def rare(d: random.Random, p: Path) -> None:
    write(p, ["text", "label"], [(text(d), "often" if i % 15 else "rare") for i in range(90)])


def codes(d: random.Random, p: Path) -> None:
    rows = [(f"0{100 + i % 20}", text(d), d.choice(["buy", "sell"])) for i in range(90)]
    write(p, ["zip", "message", "intent"], rows)


def pairs(d: random.Random, p: Path) -> None:
    rows = [(i, text(d), text(d), d.choice(["yes", "no"])) for i in range(60)]
    write(p, ["idx", "premise", "hypothesis", "gold_label"], rows)


def folder(d: random.Random, p: Path) -> None:
    p.mkdir()
    for name, count in (("train", 60), ("validation", 12)):
        rows = [{"q": text(d), "is_duplicate": bool(i % 2)} for i in range(count)]
        lines(p / f"{name}.jsonl", rows)


def messages(d: random.Random, p: Path) -> None:
    users = [{"role": "user", "content": f"why {text(d)}"} for _ in range(40)]
    answer = {"role": "assistant", "content": text(d)}
    lines(p, [{"messages": [user, answer]} for user in users])


def alpaca(d: random.Random, p: Path) -> None:
    p.write_text(
        json.dumps([{"instruction": text(d), "input": "", "output": "so"} for _ in range(40)])
    )


def completions(d: random.Random, p: Path) -> None:
    lines(p, [{"prompt": text(d), "completion": "yes"} for _ in range(40)])


def lists(d: random.Random, p: Path) -> None:
    some = [d.sample(["red", "green", "blue"], d.randint(0, 2)) for _ in range(60)]
    write(p, ["n", "text", "tags"], [(i, text(d), json.dumps(s)) for i, s in enumerate(some)])


def flags(d: random.Random, p: Path) -> None:
    rows = [(text(d), int(i % 2 == 0), int(i % 3 == 0), int(i % 12 == 0)) for i in range(90)]
    write(p, ["comment", "rude", "spam", "threat"], rows)


# name of the file -> (what writes it, expected task section)
DATA: dict[str, tuple[Callable[[random.Random, Path], None], dict[str, Any]]] = {
    "ids.csv": (ids, {"columns": {"text": "review", "label": "sentiment"}}),
    "dates.csv": (dates, {"columns": {"text": "comment", "label": "stars"}}),
    "several.csv": (several_texts, {"columns": {"text": "body", "label": "category"}}),
    "scores.csv": (scores, {"columns": {"text": "text", "label": "score"}}),
    "rare.csv": (rare, {"columns": {"text": "text", "label": "label"}, "metric": "f1_macro"}),
    "codes.csv": (codes, {"columns": {"text": "message", "label": "intent"}}),
    "pairs.csv": (
        pairs,
        {"columns": {"text": "premise", "text_pair": "hypothesis", "label": "gold_label"}},
    ),
    "folder": (folder, {"name": "json", "columns": {"text": "q", "label": "is_duplicate"}}),
    "lists.csv": (lists, {"type": "multilabel", "columns": {"text": "text", "label": "tags"}}),
    "flags.csv": (
        flags,
        {
            "type": "multilabel",
            "columns": {"text": "comment", "labels": ["rude", "spam", "threat"]},
        },
    ),
    "messages.jsonl": (messages, {"name": "chat"}),
    "alpaca.json": (alpaca, {"name": "chat"}),
    "completions.jsonl": (completions, {"name": "chat"}),
}


@pytest.mark.parametrize("name", DATA)
def test_recipe_fits_the_data(name: str, cli: Cli, tmp_path: Path) -> None:
    make, expected = DATA[name]
    make(random.Random(1), tmp_path / name)
    ended = cli("init", name, "--yes")
    assert ended.code == 0, ended.err
    path = tmp_path / f"{name.partition('.')[0]}.yaml"
    task = yaml.safe_load(path.read_text())["task"]
    assert {"path": name, "name": "csv", **expected}.items() <= task.items()
    assert ("validation_fraction" in task) == (name != "folder")
    recipe = load_recipe(path).recipe  # It is valid, and every key has an effect.
    assert f"sparsegrad train {path.name}" in ended.out
    assert ("# class_weights: balanced" in path.read_text()) == (name in ("rare.csv", "flags.csv"))
    # All rows are read whole; a longer limit would only cost nothing on short texts.
    assert recipe.task.max_length in (16, 24, 32, 48, 512)
    assert cli("validate", path.name).code == 0


def test_init_train_predict_in_three_commands(cli: Cli, tmp_path: Path) -> None:
    ids(random.Random(1), tmp_path / "ids.csv")
    base = base_folder(tmp_path / "base")
    assert cli("init", "ids.csv", "--yes", "--model", str(base)).code == 0
    quick = ("train.max_steps=2", "calibration.warmup_steps=0", "calibration.steps=2")
    assert cli("train", "ids.yaml", *quick, "-q").code == 0
    label, _, found = cli("predict", "runs/ids", "a fine film").out.strip().split("\t")
    assert label in ("a", "b") and found == "a fine film"


def test_a_file_without_header_is_noticed(cli: Cli, tmp_path: Path) -> None:
    rows = [f"{text(random.Random(i))};{'pos' if i % 2 else 'neg'}" for i in range(60)]
    (tmp_path / "my data (1).csv").write_text("\n".join(rows), encoding="utf-8")
    ended = cli("init", "my data (1).csv", "--yes")
    assert "holds its own name as a label" in " ".join(ended.out.split())
    assert ended.out.count("semicolon") == 1
    assert "sparsegrad train 'my data (1).yaml'" in ended.out


def test_one_class_is_the_reason_that_is_given(cli: Cli, tmp_path: Path) -> None:
    rows = [(text(random.Random(i)), "pos") for i in range(40)]
    write(tmp_path / "one.csv", ["text", "label"], rows)
    ended = cli("init", "one.csv", "--yes")
    assert ended.code != 0 and "every training label is 'pos'" in ended.flat


def test_columns_can_be_named(cli: Cli, tmp_path: Path) -> None:
    several_texts(random.Random(1), tmp_path / "several.csv")
    found = json.loads(cli("init", "several.csv", "--json").out)
    assert (found["text"], found["label"]) == ("body", "category")
    assert "body is taken as the text; --text-column chooses title" in found["notes"]
    again = cli("init", "several.csv", "--json")
    assert (again.code, "several.yaml exists already" in again.flat) == (2, True)
    options = ("--text-column", "title", "-o", "other.yaml", "--json")
    named = json.loads(cli("init", "several.csv", *options).out)
    assert (named["text"], named["recipe"]) == ("title", "other.yaml")
    wrong = cli("init", "several.csv", "--label-column", "nope", "-o", "third.yaml")
    assert (wrong.code, "the data has no column 'nope'" in wrong.flat) == (2, True)


def test_it_asks_where_several_columns_fit(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several_texts(random.Random(1), tmp_path / "several.csv")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *args, **settings: 2)
    ended = cli("init", "several.csv")
    assert "Several columns may be the text" in ended.out
    recipe = yaml.safe_load((tmp_path / "several.yaml").read_text())
    assert recipe["task"]["columns"]["text"] == "title"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a b c", "n": [{"x": 1}]}] * 9, "found no column for the label"),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}] * 9, "preferred and rejected answers"),
        ([{"a": n, "b": n % 2} for n in range(40)], "found no column for the text"),
        ([{"text": "one text", "label": "x"}] * 9, "found no column for the text"),
    ],
)
def test_data_without_a_task_is_refused(
    rows: list[dict[str, Any]], expected: str, cli: Cli, tmp_path: Path
) -> None:
    lines(tmp_path / "data.jsonl", rows)
    ended = cli("init", "data.jsonl", "--yes")
    assert (ended.code, expected in ended.flat) == (2, True), ended.err
    assert not (tmp_path / "data.yaml").exists()
    assert cli("init", "nowhere.csv").code == 2


def test_labels_with_a_separator_are_noted(cli: Cli, tmp_path: Path) -> None:
    draw = random.Random(1)
    for name, some in (("several", ["a", "b", "a;b"]), ("one", ["a;x", "b;y"])):
        rows = [(text(draw), draw.choice(some)) for _ in range(60)]
        write(tmp_path / f"{name}.csv", ["text", "label"], rows)
    found = json.loads(cli("init", "several.csv", "--json").out)
    note = "labels such as 'a;b' may be several: task.type: multilabel with task.label_separator"
    assert any(each.startswith(note) for each in found["notes"])
    other = json.loads(cli("init", "one.csv", "--json").out)
    assert not any("may be several" in each for each in other["notes"])


def test_cells_of_several_labels_may_be_empty(cli: Cli, tmp_path: Path) -> None:
    """A row without a class would be an error; one of several labels may have none of them."""
    draw = random.Random(1)
    rows = [(text(draw), draw.choice(["a", "b", "a;b", "b;a", ""])) for _ in range(60)]
    write(tmp_path / "several.csv", ["text", "label"], rows)
    ended = cli("init", "several.csv", "--yes")
    empty = sum(label == "" for _, label in rows)
    said = " ".join(ended.out.split())
    assert f"is read as several labels, and an empty cell ({empty} of 60) as none" in said
    assert "(task.type: multilabel, task.label_separator: ';')" in said
    recipe = load_recipe(tmp_path / "several.yaml").recipe
    assert (recipe.task.type, recipe.task.label_separator) == ("multilabel", ";")
    assert cli("validate", "several.yaml").code == 0
    classes = [(words, label.replace(";", "")) for words, label in rows]
    write(tmp_path / "one.csv", ["text", "label"], classes)
    refused = cli("init", "one.csv", "--yes")
    assert refused.code == 2 and "task.type: multilabel if a row may have several" in refused.flat


def test_objects_are_not_suggested_as_the_text(cli: Cli, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [{"doc": {"text": text(draw)}, "label": "ab"[i % 2]} for i in range(60)]
    lines(tmp_path / "nested.jsonl", rows)
    ended = cli("init", "nested.jsonl", "--yes")
    assert ended.code == 2 and "doc holds objects: write the field that is meant as" in ended.flat
    assert "--text-column" not in ended.flat
    named = cli("init", "nested.jsonl", "--text-column", "doc")
    assert named.code == 2 and "holds an object with fields, expected text" in named.flat
    assert "write the text of a row as a column of its own" in named.flat


def test_counts_and_columns_are_described_as_they_are(cli: Cli, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [
        {"text": text(draw), "label": i % 2 == 0, "vector": [0.5, 0.25], "a, b": text(draw)}
        for i in range(60)
    ]
    lines(tmp_path / "flags.jsonl", rows)
    shown = cli("init", "flags.jsonl", "--yes").out
    assert "true and false" in shown and "0 and 1" not in shown and "labels" not in shown
    assert "lists " in shown
    wrong = cli("init", "flags.jsonl", "--label-column", "x", "-o", "x.yaml")
    assert "one of text, label, vector, 'a, b'" in wrong.flat
    messages(draw, tmp_path / "chat.jsonl")
    chat = " ".join(cli("init", "chat.jsonl").out.split())
    assert "conversations, 40 rows" in chat and " of 40 opening prompts validate" in chat
    rows = [{"text": text(draw), "label": "often" if i else "rare"} for i in range(60)]
    lines(tmp_path / "rare.jsonl", rows)
    cli("init", "rare.jsonl", "--yes")
    assert "1 row is rare, 53 often" in (tmp_path / "rare.yaml").read_text()
