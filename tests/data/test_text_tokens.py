"""Token ids and batches, with a real BERT tokenizer and small GPT-2- and LLaMA-like ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.task_data import load_task

from sparsegrad_cli.data.batches import TextCollator, longest_batch
from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.data.text_tokens import ensure_pad_token, tokenize
from sparsegrad_cli.errors import DataError, UsageError

ROWS = [
    ("a cat sat on the mat", "it did", 0),
    ("dogs", "they bark at night and all day long", 1),
    ("one two three four five six seven eight nine ten", "eleven", 0),
    ("why", "because", 1),
]


@pytest.fixture(scope="module")
def bert() -> Any:
    from transformers import AutoTokenizer

    from sparsegrad_cli.models.pretrained import locate

    return AutoTokenizer.from_pretrained(locate("builtin:minilm"))


def byte_tokenizer(*, bos: bool) -> Any:
    """One token a byte, no pad token; with ``bos`` a start token is added, as LLaMA's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_task(
    folder: Path, *, pair: bool, scores: bool = False, rows: list[tuple[str, str, int]] = ROWS
) -> TextData:
    head = "text\ttext_pair\tlabel\n" if pair else "text\tlabel\n"
    lines = []
    for text, other, label in rows:
        shown = label + 0.5 if scores else label
        lines.append(f"{text}\t{other}\t{shown}\n" if pair else f"{text}\t{shown}\n")
    for split in ("train", "validation"):
        (folder / f"{split}.tsv").write_text(head + "".join(lines))
    return load_task("csv", path=folder)


def test_pairs_carry_both_texts_and_types(tmp_path: Path, bert: Any) -> None:
    train, validation, _ = tokenize(
        make_task(tmp_path, pair=True), bert, max_length=64, padding="dynamic"
    )
    assert train.column_names == ["input_ids", "attention_mask", "token_type_ids", "labels"]
    assert list(validation) == ["validation"]
    for row, (text, other, label) in zip(train, ROWS, strict=True):
        expected = f"[CLS] {text} [SEP] {other} [SEP]"
        assert bert.decode(row["input_ids"]) == expected
        assert row["labels"] == label and set(row["attention_mask"]) == {1}
        assert sum(row["token_type_ids"]) == len(bert(other)["input_ids"]) - 1
    assert validation["validation"][:] == train[:]


def test_truncation_keeps_special_tokens(tmp_path: Path, bert: Any) -> None:
    train, *_ = tokenize(make_task(tmp_path, pair=False), bert, max_length=5, padding="dynamic")
    assert [len(row["input_ids"]) for row in train] == [5, 3, 5, 3]
    assert bert.decode(train[2]["input_ids"]) == "[CLS] one two three [SEP]"


@pytest.mark.parametrize("padding", ["dynamic", "fixed"])
@pytest.mark.parametrize("written_in_python", [False, True])
def test_rows_that_are_cut_are_counted(
    tmp_path: Path, bert: Any, padding: Any, written_in_python: bool
) -> None:
    class Slow:
        num_special_tokens_to_add = staticmethod(bert.num_special_tokens_to_add)

        def __call__(self, *texts: Any, **options: Any) -> Any:
            encoded = bert(*texts, **options)
            encoded._encodings = None
            return encoded

    tokenizer = Slow() if written_in_python else bert
    task = make_task(tmp_path, pair=False)
    lengths = [len(bert(text)["input_ids"]) for text, *_ in ROWS]
    for max_length in (5, max(lengths) - 1, max(lengths)):
        *_, note = tokenize(task, tokenizer, max_length=max_length, padding=padding)
        count = sum(length > max_length for length in lengths)
        rows = f"{count} of 4 training rows, {count} of 4 validation rows"
        said = f"cut to {max_length} tokens (task.max_length): {rows}"
        assert note == (said if count else None)


@pytest.mark.parametrize(
    ("pair", "max_length", "special"), [(False, 2, 2), (True, 3, 3), (True, 1, 3)]
)
def test_a_max_length_without_room_for_text_is_refused(
    tmp_path: Path, bert: Any, pair: bool, max_length: int, special: int
) -> None:
    with pytest.raises(DataError, match=f"{special} special tokens") as caught:
        tokenize(make_task(tmp_path, pair=pair), bert, max_length=max_length, padding="dynamic")
    assert f"max_length {max_length} is too small" in caught.value.what
    assert caught.value.fix is not None and str(special + 1) in caught.value.fix


@pytest.mark.parametrize("padding", ["dynamic", "fixed"])
def test_texts_that_the_tokenizer_drops_are_refused(
    tmp_path: Path, bert: Any, padding: Any
) -> None:
    # BERT's normalizer drops control characters: nothing is left but [CLS] and [SEP].
    task = make_task(tmp_path, pair=False, rows=[("\x01", "", 0), ("\x02", "", 1)])
    with pytest.raises(DataError, match="nothing but the 2 special tokens"):
        tokenize(task, bert, max_length=16, padding=padding)


def test_a_text_without_a_token_is_refused(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("x\t1\t\tgood\nx\t0\t*\t\n")
    task = load_task("glue/cola", path=tmp_path)
    with pytest.raises(DataError, match="row 2 of the training split has no token"):
        tokenize(task, byte_tokenizer(bos=False), max_length=8, padding="dynamic")


def test_dynamic_padding_goes_to_the_longest_of_the_batch(tmp_path: Path, bert: Any) -> None:
    train, *_ = tokenize(make_task(tmp_path, pair=False), bert, max_length=64, padding="dynamic")
    collate = TextCollator(bert, max_length=64, padding="dynamic")
    batch = collate([train[i] for i in (0, 1)])
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [8, 3]
    assert batch["input_ids"][1, 3:].tolist() == [bert.pad_token_id] * 5
    assert batch["labels"].tolist() == [0, 1] and batch["labels"].dtype == torch.int64


def test_fixed_padding_is_the_same_with_longer_rows(tmp_path: Path, bert: Any) -> None:
    task = make_task(tmp_path, pair=True)
    fixed, *_ = tokenize(task, bert, max_length=20, padding="fixed")
    dynamic, *_ = tokenize(task, bert, max_length=20, padding="dynamic")
    assert {len(row["input_ids"]) for row in fixed} == {20}
    collate = TextCollator(bert, max_length=20, padding="fixed")
    one, two = collate(list(fixed)), collate(list(dynamic))
    assert one["input_ids"].shape == (4, 20)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_scores_stay_floats(tmp_path: Path, bert: Any) -> None:
    train, *_ = tokenize(
        make_task(tmp_path, pair=False, scores=True), bert, max_length=16, padding="dynamic"
    )
    batch = TextCollator(bert, max_length=16, padding="dynamic")(list(train))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [
        0.5,
        1.5,
        0.5,
        1.5,
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_tokenizers_without_pad_token(tmp_path: Path, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    config = SimpleNamespace(pad_token_id=None)
    assert tokenizer.pad_token_id is None
    note = ensure_pad_token(tokenizer, config)
    assert note is not None and "'</s>'" in note
    assert tokenizer.pad_token_id == config.pad_token_id == 1
    assert ensure_pad_token(tokenizer, config) is None
    train, *_ = tokenize(
        make_task(tmp_path, pair=False), tokenizer, max_length=12, padding="dynamic"
    )
    assert train.column_names == ["input_ids", "attention_mask", "labels"]
    assert [len(row["input_ids"]) for row in train] == [12, 4 + bos, 12, 3 + bos]
    batch = TextCollator(tokenizer, max_length=12, padding="dynamic")(list(train))
    assert batch["input_ids"].shape == (4, 12)
    assert (batch["input_ids"][1, 4 + bos :] == 1).all()
    if bos:
        with pytest.raises(DataError, match="adds 1 special tokens"):
            tokenize(make_task(tmp_path, pair=False), tokenizer, max_length=1, padding="dynamic")


def test_pad_token_known_to_the_tokenizer_is_told_to_the_model(bert: Any) -> None:
    config = SimpleNamespace(pad_token_id=None)
    note = ensure_pad_token(bert, config)
    assert config.pad_token_id == bert.pad_token_id == 0 and note is not None and "model" in note


def test_a_tokenizer_without_pad_and_end_token_is_refused() -> None:
    with pytest.raises(UsageError, match="neither a pad token nor an end token"):
        ensure_pad_token(SimpleNamespace(pad_token_id=None, eos_token_id=None))


def test_longest_batch_is_the_worst_case(tmp_path: Path, bert: Any) -> None:
    train, *_ = tokenize(make_task(tmp_path, pair=False), bert, max_length=64, padding="dynamic")
    assert longest_batch(train, 2) == [train[2], train[0]]
    assert longest_batch(train, 9) == [train[2], train[0], train[1], train[3]]
    # Rows picked out of a set, as Trainer and calibration do, are looked up through an index.
    assert longest_batch(train.select([3, 0, 1]), 1) == [train[0]]
    with pytest.raises(ValueError, match="at least 1"):
        longest_batch(train, 0)


def test_more_rows_than_one_chunk(
    tmp_path: Path, bert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, pair=True)
    whole, *_ = tokenize(task, bert, max_length=16, padding="dynamic")
    monkeypatch.setattr("sparsegrad_cli.data.text_tokens._CHUNK", 3)
    pieces, *_ = tokenize(task, bert, max_length=16, padding="dynamic")
    assert pieces[:] == whole[:] and len(pieces) == 4
