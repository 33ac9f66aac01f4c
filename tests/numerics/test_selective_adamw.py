"""AdamW on chosen entries equals a reference that updates one entry at a time in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.selective_adamw import AdamW, Moments, sparse_step, step_on_entries

ROWS, COLUMNS = 6, 7
HYPER = AdamW(lr=0.05, beta1=0.8, beta2=0.97, eps=1e-8, weight_decay=0.1)


@dataclass
class Entry:
    """The reference's state of one entry."""

    value: float
    first: float = 0.0
    second: float = 0.0
    age: int = 0

    def step(self, grad: float, hyper: AdamW) -> None:
        """Take an AdamW step, with bias correction by the entry's own age."""
        self.age += 1
        self.first = hyper.beta1 * self.first + (1 - hyper.beta1) * grad
        self.second = hyper.beta2 * self.second + (1 - hyper.beta2) * grad * grad
        first_hat = self.first / (1 - hyper.beta1**self.age)
        second_hat = self.second / (1 - hyper.beta2**self.age)
        decay = hyper.lr * hyper.weight_decay * self.value
        self.value -= hyper.lr * first_hat / (math.sqrt(second_hat) + hyper.eps) + decay


def choose_by_python(grad: Tensor, count: int) -> Tensor:
    sizes = [abs(v) for v in grad.reshape(-1).tolist()]
    return torch.tensor(sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:count]))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 5, ROWS * COLUMNS])
def test_twenty_steps_equal_the_reference(count: int, weight_decay: float) -> None:
    hyper = AdamW(0.05, 0.8, 0.97, 1e-8, weight_decay)
    parameter = normal(ROWS, COLUMNS, seed=0)
    oracle = [Entry(v) for v in parameter.reshape(-1).tolist()]
    moments = Moments.like(parameter)
    for step in range(20):
        grad = normal(ROWS, COLUMNS, seed=100 + step)
        chosen = sparse_step(parameter, grad, moments, hyper, lambda g: choose_by_python(g, count))
        flat = grad.reshape(-1).tolist()
        for index in chosen.tolist():
            oracle[index].step(flat[index], hyper)
    for got, field in (
        (parameter, "value"),
        (moments.first, "first"),
        (moments.second, "second"),
        (moments.age, "age"),
    ):
        expected = torch.tensor([getattr(e, field) for e in oracle], dtype=torch.float64)
        torch.testing.assert_close(got.reshape(-1).double(), expected, atol=1e-12, rtol=0)
    assert int(moments.age.sum()) == 20 * count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unselected_entries_are_unchanged(dtype: torch.dtype) -> None:
    parameter = normal(ROWS, COLUMNS, seed=0).to(dtype)
    moments = Moments.like(parameter)
    everything = torch.arange(ROWS * COLUMNS)
    sparse_step(parameter, normal(ROWS, COLUMNS, seed=1), moments, HYPER, lambda g: everything)
    kept = [t.clone() for t in (parameter, moments.first, moments.second, moments.age)]
    chosen = torch.tensor([0, 8, 41])
    for step in range(5):
        sparse_step(
            parameter, normal(ROWS, COLUMNS, seed=2 + step), moments, HYPER, lambda g: chosen
        )
    untouched = torch.ones(ROWS * COLUMNS, dtype=torch.bool)
    untouched[chosen] = False
    now = (parameter, moments.first, moments.second, moments.age)
    for before, after in zip(kept, now, strict=True):
        assert torch.equal(before.reshape(-1)[untouched], after.reshape(-1)[untouched])
        assert (before.reshape(-1)[chosen] != after.reshape(-1)[chosen]).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("late", [0, 1, 10, 500])
def test_first_step_of_a_late_entry_is_the_learning_rate(
    late: int, dtype: torch.dtype, tolerance: float
) -> None:
    """With one shared counter, it would be 0.48 x lr at t = 11 and 1.99 x lr at t = 501."""
    hyper = AdamW(lr=0.01)
    parameter = torch.zeros(2, 2, dtype=dtype)
    moments = Moments.like(parameter)
    grad = torch.tensor([[0.5, 0.0], [0.0, -3.0]], dtype=dtype)
    for _ in range(late):
        sparse_step(parameter, grad, moments, hyper, lambda g: torch.tensor([0]))
    assert float(parameter[1, 1]) == 0.0
    sparse_step(parameter, grad, moments, hyper, lambda g: torch.tensor([3]))
    expected = 0.01 * 3.0 / (3.0 + hyper.eps)
    assert float(parameter[1, 1]) == pytest.approx(expected, rel=tolerance)
    assert moments.age.tolist() == [[late, 0], [0, 1]]


def test_shared_counter_takes_other_steps() -> None:
    """Compute the rule of the published code by hand, to show that the test above detects it."""
    beta1, beta2, grad = 0.9, 0.999, 2.0

    def first_step(t: int) -> float:
        first = (1 - beta1) * grad / (1 - beta1**t)
        second = (1 - beta2) * grad * grad / (1 - beta2**t)
        return first / math.sqrt(second)

    assert first_step(1) == pytest.approx(1.0)
    assert first_step(11) == pytest.approx(0.48, abs=0.01)
    assert first_step(501) == pytest.approx(1.99, abs=0.01)
    assert first_step(100_000) == pytest.approx(3.16, abs=0.01)


def test_all_entries_selected_equals_torch_adamw() -> None:
    parameter = normal(ROWS, COLUMNS, seed=0)
    reference = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.AdamW(
        [reference], lr=0.05, betas=(0.8, 0.97), eps=1e-8, weight_decay=0.1, foreach=False
    )
    moments = Moments.like(parameter)
    everything = torch.arange(parameter.numel())
    for step in range(30):
        grad = normal(ROWS, COLUMNS, seed=50 + step)
        sparse_step(parameter, grad, moments, HYPER, lambda g: everything)
        reference.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter, reference.detach(), atol=1e-12, rtol=0)
    state = optimizer.state[reference]
    torch.testing.assert_close(moments.first, state["exp_avg"], atol=1e-12, rtol=0)
    torch.testing.assert_close(moments.second, state["exp_avg_sq"], atol=1e-12, rtol=0)


def test_no_entries_take_no_step() -> None:
    parameter = normal(ROWS, COLUMNS, seed=0)
    before, moments = parameter.clone(), Moments.like(parameter)
    chosen = sparse_step(
        parameter,
        torch.zeros_like(parameter),
        moments,
        HYPER,
        lambda g: torch.nonzero(g.view(-1))[:, 0],
    )
    assert chosen.numel() == 0
    assert torch.equal(parameter, before)
    assert int(moments.age.sum()) == 0


def test_beta1_of_zero_is_allowed() -> None:
    parameter, hyper = torch.zeros(1, 1).double(), AdamW(lr=0.1, beta1=0.0, beta2=0.0)
    moments = Moments.like(parameter)
    for _ in range(3):
        sparse_step(
            parameter, torch.tensor([[4.0]]).double(), moments, hyper, lambda g: torch.tensor([0])
        )
    assert float(parameter) == pytest.approx(-0.3, rel=1e-7)


def test_moments_of_a_half_precision_parameter_are_float32() -> None:
    moments = Moments.like(torch.zeros(3, 2, dtype=torch.bfloat16))
    assert moments.first.dtype == moments.second.dtype == torch.float32
    assert moments.age.dtype == torch.int32
    assert Moments.like(torch.zeros(2, dtype=torch.float64)).first.dtype == torch.float64


def test_moments_of_a_transposed_parameter_are_contiguous() -> None:
    moments = Moments.like(torch.zeros(3, 2).T)
    assert moments.first.shape == (2, 3)
    assert all(m.is_contiguous() for m in (moments.first, moments.second, moments.age))


def test_transposed_gradient_is_read_in_parameter_order() -> None:
    parameter = torch.zeros(2, 3, dtype=torch.float64)
    grad = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(3, 2).T  # [[1, 3, 5], [2, 4, 6]]
    moments = Moments.like(parameter)
    sparse_step(parameter, grad, moments, AdamW(lr=1.0, beta1=0.0), lambda g: torch.tensor([2]))
    assert float(moments.first[0, 2]) == 5.0


def test_step_on_entries_returns_the_update_only() -> None:
    values, moments = torch.tensor([2.0, -4.0]).double(), Moments.like(torch.zeros(3).double())
    hyper = AdamW(lr=0.1, weight_decay=0.5)
    update = step_on_entries(
        torch.tensor([0, 2]), torch.tensor([1.0, -1.0]).double(), values, moments, hyper
    )
    # -lr sign(g) - lr wd value
    expected = torch.tensor([-0.1 - 0.1 * 0.5 * 2.0, 0.1 + 0.1 * 0.5 * 4.0], dtype=torch.float64)
    torch.testing.assert_close(update, expected, atol=2e-9, rtol=0)
    assert values.tolist() == [2.0, -4.0]
