"""Methods that step LoRA's factors in their own way, against formulas in numpy, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.tiny_models import Tuned, batch, logits
from torch import nn
from torch.nn import functional as F

from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.methods.lora.method import lora_factors
from sparsegrad_cli.methods.neighbours.allora import scale_rows_of_steps
from sparsegrad_cli.methods.neighbours.gradient_settings import GRADIENTS
from sparsegrad_cli.methods.neighbours.lora_pro import correct_before_steps, corrected_gradients
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import TrainSection

Array = NDArray[np.float64]
OUT, IN, RANK, SCALE, LR, BETAS, EPS, DECAY = 6, 5, 2, 1.5, 0.05, (0.9, 0.99), 1e-8, 0.1
ON_LORA = ("gradnormlorp", "lora_pro", "allora")


class Adam:
    """AdamW on one matrix (Loshchilov & Hutter 2019, Algorithm 2)."""

    def __init__(self) -> None:
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.age = 0

    def step(self, w: Array, g: Array) -> Array:
        """Return the change of w."""
        self.age += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * g
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * g**2
        first, second = (
            self.first / (1 - BETAS[0] ** self.age),
            self.second / (1 - BETAS[1] ** self.age),
        )
        change: Array = -LR * DECAY * w - LR * first / (np.sqrt(second) + EPS)
        return change


def start(zero: bool) -> tuple[Array, Array]:
    draw = np.random.default_rng(1)
    a, b = draw.standard_normal((RANK, IN)), draw.standard_normal((OUT, RANK))
    return a, b * (0 if zero else 1)


def gradients(count: int) -> list[Array]:
    """Return gradients of W."""
    draw = np.random.default_rng(2)
    return [draw.standard_normal((OUT, IN)) for _ in range(count)]


def nearest(a: Array, b: Array, g: Array) -> tuple[Array, Array]:
    """Return the pair that makes s B h_A + s h_B A closest to G, nearest to LoRA's gradients.

    By the pseudo-inverse of the whole linear map, with A and B flattened row by row.
    """
    columns = []
    for n in range(RANK * IN):
        unit = np.eye(RANK * IN)[n].reshape(RANK, IN)
        columns.append((SCALE * b @ unit).ravel())
    for n in range(OUT * RANK):
        unit = np.eye(OUT * RANK)[n].reshape(OUT, RANK)
        columns.append((SCALE * unit @ a).ravel())
    linear = np.stack(columns, 1)
    plain = np.concatenate([(SCALE * b.T @ g).ravel(), (SCALE * g @ a.T).ravel()])
    best = plain + np.linalg.pinv(linear, rcond=1e-10) @ (g.ravel() - linear @ plain)
    return best[: RANK * IN].reshape(RANK, IN), best[RANK * IN :].reshape(OUT, RANK)


def plain_gradients(a: Array, b: Array, g: Array) -> tuple[Array, Array]:
    return SCALE * b.T @ g, SCALE * g @ a.T


def trained(
    zero: bool, steps: int, attach: Callable[[torch.optim.Optimizer, Any, Any], None], scale: float
) -> tuple[Array, Array]:
    """Return A and B after steps of AdamW on the gradients of LoRA, with an attached method."""
    a, b = (nn.Parameter(torch.tensor(part)) for part in start(zero))
    optimizer = torch.optim.AdamW([a, b], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    attach(optimizer, a, b)
    for g in map(torch.tensor, gradients(steps)):
        a.grad = scale * b.detach().T @ g
        b.grad = scale * g @ a.detach().T
        optimizer.step()
    return a.detach().numpy(), b.detach().numpy()


@pytest.mark.parametrize("zero", [True, False])
def test_lora_pro_steps_along_the_nearest_best_gradients(zero: bool) -> None:
    got = trained(zero, 4, lambda o, a, b: correct_before_steps(o, [(a, b, SCALE)]), SCALE)
    (a, b), of_a, of_b = start(zero), Adam(), Adam()
    for g in gradients(4):
        h_a, h_b = nearest(a, b, g)
        a, b = a + of_a.step(a, h_a), b + of_b.step(b, h_b)
    np.testing.assert_allclose(got[0], a, rtol=0, atol=1e-6 if zero else 1e-9)
    np.testing.assert_allclose(got[1], b, rtol=0, atol=1e-6 if zero else 1e-9)


def test_lora_pro_comes_closer_to_the_gradient_than_lora() -> None:
    (a, b), (g,) = start(zero=False), gradients(1)
    plain = plain_gradients(a, b, g)
    of_a, of_b = map(torch.tensor, plain)
    found = corrected_gradients(torch.tensor(a), torch.tensor(b), of_a, of_b, SCALE)

    def distance(h_a: Array, h_b: Array) -> float:
        return float(np.linalg.norm(SCALE * b @ h_a + SCALE * h_b @ a - g))

    corrected = [part.numpy() for part in found]
    # What no pair can reach: the part outside of both the columns of B and the rows of A.
    p_b, p_a = b @ np.linalg.pinv(b), np.linalg.pinv(a) @ a
    rest = np.linalg.norm((np.eye(OUT) - p_b) @ g @ (np.eye(IN) - p_a))
    assert distance(*corrected) == pytest.approx(rest, rel=1e-9)
    assert rest < distance(*plain)


@pytest.mark.parametrize("eta_squared", [1.0, 4.0])
@pytest.mark.parametrize("zero", [True, False])
def test_allora_scales_the_step_of_each_row(zero: bool, eta_squared: float) -> None:
    got = trained(zero, 4, lambda o, a, b: scale_rows_of_steps(o, [(a, b)], eta_squared), 1.0)
    (a, b), of_a, of_b = start(zero), Adam(), Adam()
    for g in gradients(4):
        rows = np.linalg.norm(b @ a, axis=1)
        if zero and of_a.age == 0:
            assert (1 / np.sqrt(rows + 1 / eta_squared) == np.sqrt(eta_squared)).all()
        move_a, move_b = of_a.step(a, b.T @ g), of_b.step(b, g @ a.T)
        a, b = a + move_a, b + move_b / np.sqrt(rows + 1 / eta_squared)[:, None]
    np.testing.assert_allclose(got[0], a, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got[1], b, rtol=0, atol=1e-12)


# --- GradNormLoRP


def normalized(tuned: Tuned, target: Any) -> Array:
    """Return m (W_0 + s B A) / norm of the rows by hand."""
    a, b, scale = lora_factors(tuned.model, target)
    layer: Any = tuned.model.get_submodule(target.name)
    (m,) = [p for n, p in layer.named_parameters() if "magnitude" in n]
    base = layer.base_layer.weight.detach().double().numpy()
    base = base.T if target.transposed else base
    w = base + scale * b.detach().double().numpy() @ a.detach().double().numpy()
    found: Array = w / np.linalg.norm(w, axis=1)[:, None] * m.detach().double().numpy()[:, None]
    return found


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_gradnormlorp_computes_and_merges_the_normalized_weight(architecture: str) -> None:
    tuned = Tuned("gradnormlorp", architecture)
    tuned.steps(4)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for target in tuned.targets:
        weight = normalized(tuned, target)
        np.testing.assert_allclose(
            tuned.method.merged_OI(tuned.model, target).numpy(), weight, rtol=0, atol=1e-12
        )
        layer: Any = tuned.model.get_submodule(target.name)
        inputs = F.pad(x, (0, target.in_features - 16), value=0.5)
        expected = F.linear(inputs.double(), torch.tensor(weight), layer.base_layer.bias.double())
        got = layer(inputs).double()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert tuned.method.factors(tuned.model, tuned.targets[0]) is None


def test_gradnormlorp_projects_both_factors_and_the_rest_is_adamw() -> None:
    """Six steps: A's projection is chosen in steps 1, 2 and 5, that of B in steps 1 and 4."""
    train = TrainSection(learning_rate=1e-2, weight_decay=0.1)
    tuned = Tuned("gradnormlorp", train=train)
    target = tuned.targets[0]
    a, b, _ = lora_factors(tuned.model, target)
    layer: Any = tuned.model.get_submodule(target.name)
    (m,) = [p for n, p in layer.named_parameters() if "magnitude" in n]
    plain = nn.Parameter(m.detach().clone())
    adamw = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    held = {p: p.detach().double().numpy().copy() for p in (a, b)}
    first, second = dict.fromkeys((a, b), 0.0), dict.fromkeys((a, b), 0.0)
    projections: dict[nn.Parameter, Any] = {}
    for step in range(1, 7):
        tuned.optimizer.zero_grad()
        tuned.model(**batch(seed=step)).loss.backward()
        assert a.grad is not None and b.grad is not None and m.grad is not None
        grads = {p: p.grad.double().numpy().copy() for p in (a, b) if p.grad is not None}
        plain.grad = m.grad.clone()
        tuned.optimizer.step()
        adamw.step()
        for p, chosen in ((a, (1, 2, 5)), (b, (1, 4))):
            g, tall = grads[p], p is b
            g = g.T if tall else g
            if step in chosen:
                signs = tuned.optimizer.state[p]["projection"].double().numpy()
                vectors = np.linalg.eigh(g @ g.T)[1][:, ::-1][:, :2]
                # Signs, and any basis of a gradient that is zero, are free.
                free = not g.any()
                projections[p] = signs if free else vectors * np.sign((vectors * signs).sum(0))
            low = projections[p].T @ g
            first[p] = 0.9 * first[p] + 0.1 * low
            second[p] = 0.999 * second[p] + 0.001 * low**2
            low = first[p] / (1 - 0.9**step) / (np.sqrt(second[p] / (1 - 0.999**step)) + 1e-8)
            move = projections[p] @ low
            held[p] = held[p] * (1 - 1e-3) - 1e-2 * (move.T if tall else move)
    for p in (a, b):
        np.testing.assert_allclose(p.detach().double().numpy(), held[p], rtol=0, atol=1e-4)
    torch.testing.assert_close(m, plain, rtol=0, atol=1e-7)


# --- what a recipe says


@pytest.mark.parametrize("name", ON_LORA)
def test_state_is_what_the_reference_page_says(name: str) -> None:
    tuned = Tuned(name)
    tuned.steps(3)
    total = expected = 0
    for target in tuned.targets:
        a, b, _ = lora_factors(tuned.model, target)
        for p in (a, b):
            total += sum(v.numel() * v.element_size() for v in tuned.optimizer.state[p].values())
            short, long = sorted(p.shape)
            k = tuned.method.settings.rank // 2 if name == "gradnormlorp" else 0
            expected += 4 + (4 * (2 * k * long + short * k) if k else 4 * 2 * p.numel())
    assert total == expected


@pytest.mark.parametrize("name", ["lora_pro", "allora"])
def test_the_change_is_a_lora_adapter(name: str) -> None:
    tuned = Tuned(name)
    tuned.steps(3)
    for target in tuned.targets:
        factors = tuned.method.factors(tuned.model, target)
        layer: Any = tuned.model.get_submodule(target.name)
        base = layer.base_layer.weight.detach().double()
        merged = tuned.method.merged_OI(tuned.model, target)
        torch.testing.assert_close(base + factors.product_OI(), merged, rtol=0, atol=1e-6)
        assert float(factors.product_OI().abs().max()) > 0
        assert name != "allora" or factors.scale == 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("method.name=allora", "method.alpha=3"), "alpha"),
        (("method.name=allora", "method.dropout=0.1"), "dropout"),
        (("method.name=gradnormlorp", "model.quantization=4bit"), "method.name"),
        (("method.name=lora_pro", "method.rank=4", "match=trainable"), "method.rank"),
    ],
)
def test_what_cannot_work_is_refused(overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises((RecipeError, UsageError)) as caught:
        load_recipe(None, overrides)
    assert key in str(caught.value)


@pytest.mark.parametrize("name", ON_LORA)
def test_split_matrices_are_refused(name: str) -> None:
    refusal = GRADIENTS[name](name=name).sharding_refusal("FSDP2")
    assert refusal is not None and "FSDP2" in refusal[1]


@pytest.mark.parametrize("name", ON_LORA)
def test_match_trainable_solves_the_rank(name: str) -> None:
    loaded = load_recipe(None, (f"method.name={name}", "method.density=0.1", "match=trainable"))
    tuned = Tuned(name)
    assert loaded.recipe.method.size_on(tuned.targets) == 1  # type: ignore[attr-defined]
    assert logits(tuned.model).isfinite().all()
