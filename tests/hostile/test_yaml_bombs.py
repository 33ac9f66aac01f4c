"""Malicious YAML (expansion, nesting, code tags, endless files): one error or a bounded result."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from support.hostile_cases import check_error, folder_content, scratch_folder, time_limit

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.study import load_study
from sparsegrad_cli.recipe.yaml_source import MOST_BYTES, dump, parse_yaml, read_yaml

LETTERS = "abcdefghij"


def laughs(item: str) -> str:
    """Return a billion-laughs document: ten lines, each repeats the previous one ten times."""
    lines = [f"a: &a {item.format(', '.join('x' * 10))}"]
    for before, here in pairwise(LETTERS):
        lines.append(f"{here}: &{here} {item.format(', '.join([f'*{before}'] * 10))}")
    return "\n".join(lines)


def ladder(rungs: int) -> str:
    """Return lines that each contain the previous one, so that the last is deeply nested."""
    steps = [f"k{n}: &k{n} [*k{n - 1}]" for n in range(1, rungs)]
    return "\n".join(["k0: &k0 [x]", *steps])


MERGED = "a: &a {p: 1, q: 2}\n" + "\n".join(
    f"{here}: &{here} {{<<: [{', '.join([f'*{before}'] * 10)}]}}"
    for before, here in pairwise(LETTERS)
)

REFUSED = {
    "aliases of aliases": (laughs("[{}]"), "expands to more than"),
    "mappings of aliases": (laughs("{{k: [{}]}}"), "expands to more than"),
    "merges of merges": (MERGED, "expands to more than"),
    "one list, a hundred thousand times": (
        "a: &a [" + "x, " * 1000 + "]\nb: [" + "*a, " * 1000 + "]",
        "expands to more than",
    ),
    "a ladder of aliases": (ladder(3000), "deeper than"),
    "an alias in itself": ("a: &a [*a]", "an alias contains itself"),
    "a mapping in itself": ("a: &a {b: {c: *a}}", "an alias contains itself"),
    "a merge of itself": ("a: &a {<<: *a}", "an alias contains itself"),
    "100,000 lists in lists": ("[" * 100_000, "nested more than"),
    "50,000 mappings in mappings": ("{a: " * 50_000, "nested more than"),
    "100,000 dashes": ("- " * 100_000, "nested more than"),
    "700 indented blocks": ("\n".join(" " * n + "a:" for n in range(700)), "nested more than"),
    "too long": ("#" * (MOST_BYTES + 1), "more than 256 KiB"),
    "a key that is a list": ("? [a, b]\n: 1", "a key must be text"),
    "python objects": (
        "a: !!python/object/apply:os.system ['touch pwned']",
        "could not determine a constructor",
    ),
    "python names": ("a: !!python/name:os.system", "could not determine a constructor"),
    "a tag of one's own": ("a: !mine {b: 1}", "could not determine a constructor"),
    "binary": ("a: !!binary aGVsbG8=", "could not determine a constructor"),
    "a number of 5,000 digits": (f"seed: {'9' * 5000}", "is not a valid int"),
    "a number in 5,000 hexadecimal digits": (f"seed: 0x{'f' * 5000}", "too large"),
    "half a character": (r'a: "\ud83d"', "U+D83D, which is not a character"),
    "a NUL": (r'a: "\0"', "U+0000, which is not a character"),
    "a NUL as it is": ("a: 1\nb: \0", "U+0000 is not allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_endless_yaml_is_refused_at_once(case: str) -> None:
    text, says = REFUSED[case]
    with scratch_folder() as folder:
        path = folder / "r.yaml"
        path.write_text(text, encoding="utf-8")
        before = folder_content(folder.parent)
        for load in (load_recipe, load_study):
            with time_limit(), pytest.raises(RecipeError) as caught:
                load(path)
            assert says in caught.value.problems[0].what
            block = check_error(caught.value)
            assert len(block) < 3000
        assert folder_content(folder.parent) == before


def test_long_harmless_yaml_is_read() -> None:
    with time_limit():
        assert parse_yaml(f"a: {'x' * 100_000}", "t").data["a"] == "x" * 100_000
        assert parse_yaml(f"a: '{'x ' * 50_000}'", "t").data["a"] == "x " * 50_000
        many = parse_yaml("a: [" + "1, " * 5_000 + "]", "t").data["a"]
    assert len(many) == 5_000
    deep = parse_yaml("a: " + "[" * 30 + "]" * 30, "t").data["a"]
    assert repr(deep) == "[" * 30 + "]" * 30


def test_anchors_aliases_and_merges_are_supported() -> None:
    layer = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n", "t")
    assert layer.data["b"] == {"x": 1, "y": 3} and layer.data["c"] == [{"x": 1, "y": 2}] * 2
    assert not layer.problems


@pytest.mark.parametrize("word", ["1e-4", "1e5", "12e3", ".5", "0x1F", "017", "1:30", "2020-01-01"])
def test_number_like_words_are_written_as_words(word: str) -> None:
    for value in (word, {word: word}, [word]):
        assert parse_yaml(dump({"a": value}), "t").data == {"a": value}


def test_dates_and_times_are_read_as_words() -> None:
    """YAML 1.1 reads 1:20 as 80, and fails on 2020-13-45."""
    layer = parse_yaml("a: 1:20\nb: 2020-13-45\nc: 2026-11-21\non: 1\n7: x\n", "t")
    assert layer.data == {"a": "1:20", "b": "2020-13-45", "c": "2026-11-21", "on": 1, "7": "x"}


def test_exponential_extends_are_refused(tmp_path: Path) -> None:
    """Each recipe extends the next one twice, so 2^20 files would be read."""
    for number in range(20):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "20.yaml").write_text("seed: 1\n")
    with time_limit(), pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "0.yaml")
    assert "more than 32 files" in caught.value.problems[0].what


@pytest.mark.parametrize("named", ["5", "true", "{a: b}", "[1]", "[[a]]", "0", "false", "''"])
def test_extends_without_a_file_is_refused(tmp_path: Path, named: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"extends: {named}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems[0].key in ("extends", "(file)")


def test_endless_device_is_refused_as_a_recipe() -> None:
    with time_limit(), pytest.raises(RecipeError, match="1 problem") as caught:
        read_yaml(Path("/dev/zero"))
    assert "more than 256 KiB" in caught.value.problems[0].what


def test_study_of_a_million_runs_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    labels = ", ".join(f"{{label: m{n}, method: full}}" for n in range(1000))
    path.write_text(f"methods: [{labels}]\nseeds: [{', '.join(map(str, range(1000)))}]\n")
    with time_limit(), pytest.raises(RecipeError) as caught:
        load_study(path)
    assert "expected at most 2,000 runs, got 1,000,000" in caught.value.problems[0].what


@pytest.mark.parametrize("twice", ["seeds: [1, 2, 1]", "tasks: [glue/rte, glue/cola, glue/rte]"])
def test_duplicate_run_names_are_refused(tmp_path: Path, twice: str) -> None:
    """Two runs with one name would write to the same folder."""
    path = tmp_path / "s.yaml"
    path.write_text(f"methods: [lora]\nsettings: {{method: {{density: 0.01}}}}\n{twice}\n")
    with pytest.raises(RecipeError) as caught:
        load_study(path)
    assert "are the same" in caught.value.problems[0].what


def test_errors_list_at_most_a_hundred_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("\n".join(f"no_such_key_{n}: 1" for n in range(2000)))
    with time_limit(), pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 101
    assert caught.value.problems[-1].key == "(more)" and caught.value.problems[0].line == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rate=.inf", "finite"),
        ("train.learning_rate=1e999", "finite"),
        ("train.adam_beta1=.nan", "finite"),
        ("seed=4294967296", "less than 4294967296"),
        ("task.max_length=4294967296", "less than or equal to 2147483647"),
        (f"method.rank={'9' * 400}GiB", "match"),
        ("output_dir=''", "got an empty one"),
        ("output_dir=~nobody-of-that-name/x", "no such home"),
        ("task={name: csv, path: ~nobody-of-that-name/x}", "no such file"),
        (f"task={{name: csv, path: '{'x' * 5000}'}}", "no such file"),
        (f"model={'/x' * 3000}", "no such folder"),
        ("int=1", "is not a key here"),
        ("method.tuple[int]=1", "is not a key here"),
    ],
)
def test_impossible_values_are_refused(override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, (override,))
    assert any(says in problem.what for problem in caught.value.problems), str(caught.value)
    assert len(check_error(caught.value)) < 5000


def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    """Root can read every folder; then the folder is simply missing."""
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ("task=csv", f"task.path={tmp_path / 'closed' / 'x.csv'}"))
    assert "no such file" in str(caught.value)
