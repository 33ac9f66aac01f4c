"""A base model's trained head is kept for the same classes, in the data's order, or drawn anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import Cli
from support.small_runs import base_folder, byte_tokenizer, data_folder
from support.tiny_models import batch, build, classifier, config
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.classification_head import match_labels
from sparsegrad_cli.models.load_model import check_vocabulary, load_classifier
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import TaskSpec

Names = tuple[str, ...]


def spec(*names: str) -> TaskSpec:
    """A task with these classes; without any a regression."""
    metric = "accuracy" if names else "pearson"
    return TaskSpec("t", ("text",), "label", names or None, not names, metric, (metric,))


def labelled(*names: str) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def saved(folder: Path, architecture: str, *names: str, **more: Any) -> nn.Module:
    """A classifier in a folder, as training has left it."""
    from transformers import AutoModelForSequenceClassification

    settings = config(architecture, **labelled(*names), **more)
    model: Any = build(AutoModelForSequenceClassification, settings, seed=3)
    model.save_pretrained(folder)
    assert isinstance(model, nn.Module)
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the head."""
    return {name: parameter.detach() for name, parameter in head_parameters(model).items()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    found: Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize(
    ("stored", "wanted", "order"),
    [
        (("bad", "good"), ("bad", "good"), (0, 1)),
        (("good", "bad"), ("bad", "good"), (1, 0)),
        (
            ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
            ("entailment", "neutral", "contradiction"),
            (2, 1, 0),
        ),
        (("Not-Equivalent", "equivalent"), ("equivalent", "not_equivalent"), (1, 0)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("2", "1", "0"), (2, 1, 0)),
        (("LABEL_0", "LABEL_1"), ("negative", "positive"), None),
        (("LABEL_0", "LABEL_1"), ("1", "2"), None),
        (("positive", "negative", "neutral"), ("negative", "positive"), None),
        (("joy", "anger"), ("bad", "good"), None),
        # Case tells these apart, or nothing does.
        (("us", "US"), ("US", "us"), (1, 0)),
        (("us", "US"), ("Us", "uS"), None),
        # A sign is not a separator.
        (("1", "0"), ("-1", "0"), None),
        (("same", "same"), ("same", "other"), None),
    ],
)
def test_labels_are_matched_by_name(
    stored: Names, wanted: Names, order: tuple[int, ...] | None
) -> None:
    about = config("bert", id2label=dict(enumerate(stored)), label2id=None)
    assert match_labels(about, spec(*wanted)).order == order


@pytest.mark.parametrize(
    ("names", "kind", "kept"),
    [
        (("LABEL_0",), None, True),
        (("score",), "regression", True),
        (("toxic",), "multi_label_classification", False),
        (("a", "b"), None, False),
    ],
)
def test_a_regression_keeps_the_head_of_a_regression_only(
    names: Names, kind: str | None, kept: bool
) -> None:
    about = config("bert", **labelled(*names), problem_type=kind)
    assert (match_labels(about, spec()).order is not None) is kept


def test_two_tables_that_contradict_each_other_name_nothing() -> None:
    about = config("bert", id2label={0: "bad", 1: "good"}, label2id={"good": 0, "bad": 1})
    assert match_labels(about, spec("bad", "good")).order is None


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "deberta-v3", "gpt2"])
def test_a_kept_head_answers_as_the_base_model_does(tmp_path: Path, architecture: str) -> None:
    base = saved(tmp_path, architecture, "good", "bad", "so-so")
    section, names = ModelSection(name=str(tmp_path)), ("bad", "good", "so_so")
    model: Any
    model, head = load_classifier(section, spec(*names), seed=1)
    assert torch.equal(logits(model), logits(base)[:, [1, 0, 2]])
    assert model.config.id2label == dict(enumerate(names))
    assert head.start == "aligned" and "data's order" in str(head.note)
    assert set(head.kept) == set(head_parameters(model)) and head.fresh == ()
    same = load_classifier(section, spec("good", "bad", "so-so"), seed=1)
    assert torch.equal(logits(same.model), logits(base))
    assert same.head.start == "kept" and "is kept" in str(same.head.note)


@pytest.mark.parametrize(
    ("architecture", "kept"),
    [
        ("bert", set()),
        ("roberta", {"classifier.dense.weight", "classifier.dense.bias"}),
        ("distilbert", {"pre_classifier.weight", "pre_classifier.bias"}),
        ("gpt2", set()),
    ],
)
@pytest.mark.parametrize("names", [("yes", "no"), ("a", "b", "c"), ()])
def test_the_output_layer_of_other_classes_is_drawn_afresh(
    tmp_path: Path, architecture: str, kept: set[str], names: Names
) -> None:
    """The layers below it are kept, and the numbers drawn depend on the seed alone."""
    base = saved(tmp_path, architecture, "good", "bad")
    section = ModelSection(name=str(tmp_path))
    model, head = load_classifier(section, spec(*names), seed=1)
    stored, fresh = values(base), values(model)
    outputs = set(fresh) - kept
    assert head.start == "fresh" and set(head.kept) == kept and set(head.fresh) == outputs
    assert all(torch.equal(fresh[name], stored[name]) for name in kept)
    weight = next(name for name in outputs if name.endswith("weight"))
    drawn = fresh[weight]
    assert drawn.shape[0] == max(1, len(names)) and 0.01 < float(drawn.std()) < 0.04
    assert not set(drawn.flatten().tolist()) & set(stored[weight].flatten().tolist())
    assert all(float(fresh[name].abs().max()) == 0 for name in outputs if name.endswith("bias"))
    again = values(load_classifier(section, spec(*names), seed=1).model)
    other = values(load_classifier(section, spec(*names), seed=2).model)
    assert torch.equal(again[weight], drawn) and not torch.equal(other[weight], drawn)
    assert "drawn afresh" in str(head.note) and ("kept of the head" in str(head.note)) == bool(kept)


def test_a_base_without_a_head_is_worth_no_note(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")  # a masked language model
    _, head = load_classifier(ModelSection(name=str(base)), spec("0", "1"), seed=1)
    assert head.note is None and head.start == "fresh" and head.kept == ()
    assert set(head.fresh) == {
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    }


def test_what_becomes_of_a_head_is_told_and_recorded(cli: Cli, tmp_path: Path) -> None:
    data, tokenizer = data_folder(tmp_path / "data"), byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    model: Any = saved(tmp_path / "known", "bert", "high", "low", **shape)
    for parameter in head_parameters(model).values():
        parameter.data = parameter.data.flip(0)
    for folder, names in (("swapped", ("low", "high")), ("unnamed", ("LABEL_0", "LABEL_1"))):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
        model.save_pretrained(tmp_path / folder)
    settings = ("task=csv", f"task.path={data}", "task.max_length=16", "method=full", "-q")
    found = {}
    for folder in ("known", "swapped", "unnamed"):
        tokenizer.save_pretrained(tmp_path / folder)
        few = ("train.max_steps=1", "train.learning_rate=1e-9", "--json", "-o", f"on-{folder}")
        said = cli("train", f"model=./{folder}", *settings, *few)
        assert said.code == 0, said.err
        found[folder] = json.loads(said.out)
    start = {folder: one["metrics"]["initial"]["loss"] for folder, one in found.items()}
    assert start["swapped"] == pytest.approx(start["known"], abs=1e-6)
    assert start["unnamed"] != pytest.approx(start["known"], abs=1e-3)
    heads = {folder: one["model"]["head"] for folder, one in found.items()}
    assert [heads[f]["start"] for f in heads] == ["kept", "aligned", "fresh"]
    assert heads["unnamed"]["fresh"] == ["classifier.bias", "classifier.weight"]
    notes = {folder: " ".join(one["task"]["notes"]) for folder, one in found.items()}
    assert "is kept: its classes have the data's names: high, low" in notes["known"]
    assert "put in the data's order" in notes["swapped"]
    assert "LABEL_0, LABEL_1 do not say which of them is which of high, low" in notes["unnamed"]


def test_more_embeddings_than_tokens_are_fine() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 66}

    check_vocabulary(Tokenizer(), classifier(), "model.name")
    with pytest.raises(UsageError, match=r"ids up to 66 .* 66 embeddings: .* 'b' \(66\)"):
        check_vocabulary(Tokenizer(), classifier(vocab_size=66), "model.name")


@pytest.mark.parametrize("task", ["csv", "chat"])
def test_a_tokenizer_larger_than_the_embeddings_is_refused_before_the_first_step(
    cli: Cli, tmp_path: Path, task: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_folder(tmp_path / "base", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if task == "chat":
        build(AutoModelForCausalLM, config("gpt2", vocab_size=len(tokenizer))).save_pretrained(base)  # type: ignore[operator]
        data = tmp_path / "talk.jsonl"
        rows = [f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(40)]
        data.write_text("".join(rows), encoding="utf-8")
    else:
        data = data_folder(tmp_path / "data")
    first = len(tokenizer)
    tokenizer.add_tokens(["<|think|>", "crimson"])
    tokenizer.save_pretrained(base)
    said = cli("train", f"model={base}", f"task={task}", f"task.path={data}", "-o", "run")
    assert said.code == 2 and "Traceback" not in said.err
    assert f"ids up to {first + 1} and the model {first} embeddings" in said.flat
    assert f"'<|think|>' ({first}), 'crimson' ({first + 1})" in said.flat
    assert "resize_token_embeddings" in said.flat
    assert not list((tmp_path / "run").glob("steps.jsonl"))
