"""Batches of conversations: padding, packing without a change of the loss, and blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, build, config, one_thread
from torch import Tensor, nn

from sparsegrad_cli.data.batches import ChatCollator, concatenate, first_fit, pack, token_rows
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.models.lm_head import check_packing
from sparsegrad_cli.models.lm_loss import lm_loss

END = 2  # also the pad token, as SmolLM2 has it


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def rows(*lengths: int, seed: int = 0) -> Any:
    """Conversations of these lengths that end in END; about half of the tokens are labelled."""
    dice = random.Random(seed)
    ids = [[dice.randrange(3, VOCABULARY) for _ in range(size - 1)] + [END] for size in lengths]
    labels = [
        [i if k and (k == len(row) - 1 or dice.random() < 0.5) else -100 for k, i in enumerate(row)]
        for row in ids
    ]
    return token_rows(ids, labels)


# --- bins


def naive_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for items in bins:
            if sum(lengths[i] for i in items) + lengths[item] <= capacity:
                items.append(item)
                break
        else:
            bins.append([item])
    return sorted(sorted(items) for items in bins)


def test_first_fit_is_first_fit_decreasing() -> None:
    dice = random.Random(1)
    for count in range(60):
        lengths = [dice.randint(1, 50) for _ in range(count)]
        found = first_fit(lengths, 50)
        assert found == naive_first_fit(lengths, 50)
        assert sorted(i for items in found for i in items) == list(range(count))
        assert len(found) <= sum(lengths) / 50 * 11 / 9 * 2 + 1


def test_items_that_fill_a_bin_exactly() -> None:
    assert first_fit([6, 4, 5, 5, 10], 10) == [[0, 1], [2, 3], [4]]
    assert first_fit([], 10) == []
    with pytest.raises(ValueError, match="11 does not fit"):
        first_fit([3, 11], 10)


# --- padding


def test_padding_follows_from_lengths_not_from_token_ids() -> None:
    data = rows(5, 3)
    batch = ChatCollator(END)(list(data))
    assert batch["input_ids"].tolist() == [data[0]["input_ids"], [*data[1]["input_ids"], END, END]]
    assert batch["labels"].tolist() == [data[0]["labels"], [*data[1]["labels"], -100, -100]]
    assert (
        batch["labels"][0, 4] == batch["labels"][1, 2] == END
    )  # the end is learnt, though it pads
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 5), ({"fixed_length": 9}, 9)],
)
def test_length_of_a_batch(options: dict[str, int], length: int) -> None:
    for data in (rows(5, 3), pack(rows(3, 2, 5), 5)):
        batch = ChatCollator(END, **options)(list(data))
        assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, length)}


# --- packing


def test_every_conversation_is_packed_once_and_whole() -> None:
    data = rows(9, 4, 7, 2, 12, 3, 3)
    packed = pack(data, 12)
    assert max(len(row["input_ids"]) for row in packed) <= 12
    found = []
    for row in packed:
        start = 0
        for size in row["lengths"]:
            ids, labels = (row[name][start : start + size] for name in ("input_ids", "labels"))
            found.append((ids, labels))
            start += size
        assert start == len(row["input_ids"]) == len(row["labels"])
    expected = [(row["input_ids"], row["labels"]) for row in data]
    assert sorted(found) == sorted(expected)
    assert pack(data, 12)[:] == packed[:]


def test_packing_cuts_long_conversations_and_drops_unlabelled_ones() -> None:
    data = token_rows(
        [[3, 4, 5, 6, 7, 8], [3, 4, 5, 6]], [[-100, 4, -100, -100, 7, 8], [-100] * 3 + [6]]
    )
    assert pack(data, 3)[:] == {
        "input_ids": [[3, 4, 5]],
        "labels": [[-100, 4, -100]],
        "lengths": [[3]],
    }
    with pytest.raises(DataError, match="no row of 1 tokens"):
        pack(data, 1)


def test_no_conversation_predicts_the_first_token_of_the_next() -> None:
    data = token_rows([[3, 4], [5, 6]], [[3, 4], [5, 6]])
    batch = ChatCollator(END)(list(pack(data, 4)))
    assert batch["labels"].tolist() == [[-100, 4, -100, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert "attention_mask" not in batch


def model_of(architecture: str, attention: str = "sdpa", **overrides: Any) -> nn.Module:
    """A tiny random model in float64."""
    from transformers import AutoModelForCausalLM

    model: Any = build(AutoModelForCausalLM, config(architecture, **overrides))
    model.set_attn_implementation(attention)
    result: nn.Module = model.double()
    return result


def summed(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Loss summed over all tokens of the batches, and the gradient of the first block's MLP."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = lm_loss(model, batch, 1.0)
        loss.backward()
        total += loss.detach()
    weight = next(p for name, p in model.named_parameters() if "mlp" in name)
    assert weight.grad is not None
    return total, weight.grad.clone()


FAMILIES = [
    ("llama", {}),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma", {}),
    ("gpt2", {}),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("architecture", "overrides"), FAMILIES)
def test_packed_losses_and_gradients_are_the_unpacked_ones(
    architecture: str, overrides: dict[str, Any], attention: str
) -> None:
    model = model_of(architecture, attention, **overrides)
    rtol = atol = 1e-12
    if attention == "eager":  # which takes its softmax in float32 whatever the model's dtype
        model.float()
        rtol = atol = 1e-5
    data = rows(9, 4, 7, 2, 6, 11)
    collate = ChatCollator(END)
    alone = summed(model, [collate([row]) for row in data])
    for batches in ([collate(list(data))], [collate(list(pack(data, 13)))]):
        for found, expected in zip(summed(model, batches), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("architecture", "overrides"), FAMILIES)
def test_families_that_keep_packed_conversations_apart(
    architecture: str, overrides: dict[str, Any]
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_packing(model_of(architecture, **overrides).to(dtype))


def test_a_family_that_mixes_packed_conversations_is_refused() -> None:
    with pytest.raises(UsageError, match="OPTForCausalLM does not keep conversations apart"):
        check_packing(model_of("opt"))


# --- the paper's blocks


def test_blocks_equal_handwritten_ones() -> None:
    data = token_rows(
        [[3, 4, END], [5, 6, 7, 8], [9, END]],
        [[-100, 4, END], [-100, -100, 7, 8], [-100, END]],
    )
    assert concatenate(data, 4, END)[:] == {
        "input_ids": [[3, 4, END, 5], [6, 7, 8, END], [9, END]],
        "labels": [[-100, 4, END, -100], [-100, 7, 8, -100], [-100, END]],
    }


def test_blocks_without_a_label_are_left_out() -> None:
    data = token_rows([[3, 4, 5, 6, END]], [[-100] * 4 + [END]])
    # In the middle block nothing is learnt; the last one's only label has nothing before it.
    assert concatenate(data, 3, END)[:]["input_ids"] == [[6, END]]
    with pytest.raises(DataError, match="no row of 2 tokens"):
        concatenate(data, 2, END)


def test_attention_crosses_conversations_in_blocks() -> None:
    model = model_of("llama")
    data = rows(6, 6)
    (block,) = list(concatenate(data, 12, END))
    batch = ChatCollator(END)([block])
    assert batch["position_ids"].tolist() == [list(range(12))]
    alone = [ChatCollator(END)([row]) for row in data]
    assert not torch.allclose(summed(model, [batch])[0], summed(model, alone)[0], rtol=1e-6)
