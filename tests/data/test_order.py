"""The order of examples depends on seed and epoch only; digests of the order."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from sparsegrad_cli.data.batches import ChatCollator
from sparsegrad_cli.data.order import EpochSampler, OrderHash

SIZE = 103
LENGTHS = [5 + (7 * n) % 60 for n in range(SIZE)]


def sampler(seed: int = 3, strategy: str = "random", size: int = SIZE) -> EpochSampler:
    return EpochSampler(
        range(size), seed=seed, strategy=strategy, lengths=LENGTHS[:size], batch_size=8
    )


def order(epoch: int = 0, seed: int = 3, strategy: str = "random") -> list[int]:
    made = sampler(seed, strategy)
    made.set_epoch(epoch)
    return list(made)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_every_epoch_is_a_permutation(strategy: str, epoch: int) -> None:
    assert sorted(order(epoch, strategy=strategy)) == list(range(SIZE))
    assert len(sampler(strategy=strategy)) == SIZE


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_order_differs_by_epoch_and_by_seed(strategy: str) -> None:
    orders = [order(e, s, strategy) for e in range(4) for s in range(4)]
    assert len({tuple(o) for o in orders}) == 16


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_order_is_the_same_across_instances_whatever_was_drawn_before(strategy: str) -> None:
    first = order(2, strategy=strategy)
    torch.rand(100)
    random.random()
    assert order(2, strategy=strategy) == first
    made = sampler(strategy=strategy)
    made.set_epoch(1)
    list(made)
    made.set_epoch(2)
    assert list(made) == first == list(made), "and whichever epochs were walked before"


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_sampling_draws_nothing_from_the_global_generators(strategy: str) -> None:
    state, python_state = torch.get_rng_state(), random.getstate()
    order(strategy=strategy)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_sequential_is_in_file_order() -> None:
    assert order(5, strategy="sequential") == list(range(SIZE))


def test_random_order_is_shuffled() -> None:
    moved = sum(index != place for place, index in enumerate(order()))
    assert moved > SIZE // 2


def spread(indices: list[int]) -> float:
    """Mean difference of the longest and shortest example over batches of 8."""
    groups = [indices[n : n + 8] for n in range(0, len(indices) - 7, 8)]
    return sum(max(LENGTHS[i] for i in g) - min(LENGTHS[i] for i in g) for g in groups) / len(
        groups
    )


def test_group_by_length_puts_similar_lengths_together_but_not_in_order() -> None:
    grouped = order(strategy="group_by_length")
    assert spread(grouped) < 0.4 * spread(order())
    lengths = [LENGTHS[i] for i in grouped]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))


def test_an_empty_and_a_single_example() -> None:
    assert list(sampler(size=1)) == [0]
    assert list(sampler(size=0)) == []


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 99, (4, 6), generator=generator),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "labels": torch.randint(0, 2, (4,), generator=generator),
    }


def digests(batches: list[dict[str, Tensor]], every: int = 1) -> dict[str, str]:
    chain = OrderHash(every)
    for step, one in enumerate(batches, start=1):
        chain.add(one)
        chain.mark(step, last=step == len(batches))
    return chain.kept


def test_equal_batches_give_equal_digests() -> None:
    assert digests([batch(n) for n in range(5)]) == digests([batch(n) for n in range(5)])


def test_digests_differ_from_the_first_different_batch_on() -> None:
    first = digests([batch(n) for n in range(5)])
    second = digests([batch(0), batch(1), batch(9), batch(3), batch(4)])
    assert [first[str(n)] == second[str(n)] for n in range(1, 6)] == [True, True] + [False] * 3


def test_digests_depend_on_the_order_of_batches() -> None:
    assert digests([batch(0), batch(1)])["2"] != digests([batch(1), batch(0)])["2"]


def test_digests_depend_on_ids_labels_and_shape() -> None:
    base = batch(0)
    first = digests([base])["1"]
    ids, labels = base["input_ids"].clone(), base["labels"].clone()
    ids[3, 5] += 1
    labels[2] = 1 - labels[2]
    assert digests([{**base, "input_ids": ids}])["1"] != first
    assert digests([{**base, "labels": labels}])["1"] != first
    assert digests([{**base, "input_ids": base["input_ids"].reshape(6, 4)}])["1"] != first
    assert digests([{k: v for k, v in base.items() if k != "labels"}])["1"] != first
    moved = {"input_ids": base["labels"], "labels": base["input_ids"]}
    assert digests([moved])["1"] != first


def test_ids_without_labels_are_not_labels_without_ids() -> None:
    values = batch(0)["labels"]
    assert digests([{"input_ids": values}]) != digests([{"labels": values}])


def test_digests_depend_on_the_split_into_batches() -> None:
    whole = batch(0)
    halves = [{k: v[:2] for k, v in whole.items()}, {k: v[2:] for k, v in whole.items()}]
    chain, other = OrderHash(1), OrderHash(1)
    chain.add(whole)
    for half in halves:
        other.add(half)
    chain.mark(1)
    other.mark(1)
    assert chain.kept != other.kept


def test_digests_do_not_depend_on_memory_layout() -> None:
    base = batch(0)
    strided = {**base, "input_ids": base["input_ids"].T.contiguous().T}
    assert not strided["input_ids"].is_contiguous()
    assert digests([strided]) == digests([base])


def test_digests_are_kept_at_every_nth_and_the_last_step() -> None:
    assert list(digests([batch(n) for n in range(10)], every=4)) == ["4", "8", "10"]
    assert list(digests([batch(n) for n in range(3)], every=0)) == ["1", "2", "3"]


def test_digests_continue_from_a_checkpoint() -> None:
    whole = digests([batch(n) for n in range(8)], every=2)
    first = OrderHash(2)
    for step in range(1, 6):
        first.add(batch(step - 1))
        first.mark(step)
    state = first.state()
    second = OrderHash(2)
    second.load_state(state)
    for step in range(6, 9):
        second.add(batch(step - 1))
        second.mark(step, last=step == 8)
    assert second.kept == whole
    assert set(state["kept"]) == {"2", "4"}, "a state that was handed out does not change"


# --- rows: however a step's examples are cut into micro-batches


def ragged(seed: int, lengths: list[int], kind: str) -> dict[str, Tensor]:
    """Rows of their own lengths as a collator pads them: with a mask, or packed without one."""
    rows = [{"input_ids": batch(seed)["input_ids"][0, :length].tolist()} for length in lengths]
    for number, row in enumerate(rows):
        row["labels"] = [-100, *(number + n for n in row["input_ids"][1:])]
    if kind == "packed":
        rows = [row | {"lengths": [len(row["input_ids"])]} for row in rows]
    return ChatCollator(0)(rows)


def row_digest(batches: list[dict[str, Tensor]]) -> str:
    chain = OrderHash(1)
    for one in batches:
        chain.add(one)
    chain.mark(1)
    return chain.kept_rows["1"]


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_row_digests_do_not_depend_on_micro_batches_and_padding(kind: str) -> None:
    whole = row_digest([ragged(0, [3, 6, 2, 5], kind)])
    halves = [ragged(0, [3, 6], kind), ragged(0, [2, 5], kind)]
    for half, first in zip(halves, (0, 2), strict=True):  # labels count rows from 0 in each
        half["labels"][half["labels"] != -100] += first
        where = (half["labels"] == -100) if kind == "packed" else half["attention_mask"] == 0
        half["labels"][where] = -100
    assert row_digest(halves) == whole
    assert row_digest(halves[::-1]) != whole
    longer = ragged(0, [3, 6, 2, 6], kind)
    assert row_digest([longer]) != whole


def test_row_digests_depend_on_labels() -> None:
    base = batch(0)
    halves = [{k: v[:2] for k, v in base.items()}, {k: v[2:] for k, v in base.items()}]
    assert row_digest(halves) == row_digest([base])
    other = {**base, "labels": 1 - base["labels"]}
    assert row_digest([other]) != row_digest([base])
    assert row_digest([{**base, "input_ids": base["input_ids"] + 1}]) != row_digest([base])


def test_row_digests_continue_from_a_checkpoint_that_has_them() -> None:
    first = OrderHash(1)
    first.add(batch(0))
    first.mark(1)
    state = first.state()
    for earlier, kept in ((state, {"1", "2"}), ({"digest": "", "kept": {}}, set())):
        second = OrderHash(1)
        second.load_state(earlier)
        second.add(batch(1))
        second.mark(2)
        assert set(second.kept_rows) == kept
    whole = OrderHash(1)
    for number in range(2):
        whole.add(batch(number))
    whole.mark(2)
    again = OrderHash(1)
    again.load_state(state)
    again.add(batch(1))
    again.mark(2)
    assert again.kept_rows["2"] == whole.kept_rows["2"]


@pytest.mark.parametrize(
    ("rows", "processes", "size"), [(9, 2, 2), (8, 2, 2), (13, 3, 2), (3, 4, 2)]
)
def test_processes_fill_the_end_of_an_epoch_with_its_beginning(
    rows: int, processes: int, size: int
) -> None:
    """Check what docs/how-to/train-on-several-gpus.md says about accelerate and our sampler."""
    from accelerate.data_loader import BatchSamplerShard

    made = sampler(size=rows)
    batches = BatchSampler(made, size, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, number)) for number in range(processes)]
    met = [row for step in zip(*shards, strict=True) for batch in step for row in batch]
    whole = processes * size * -(-rows // (processes * size))
    assert met == [row for _, row in zip(range(whole), itertools.cycle(made), strict=False)]
