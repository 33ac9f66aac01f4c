"""Methods with a low-rank or partial view of the gradient, against formulas in numpy, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.tiny_models import Tuned, batch, classifier, targets_of, weight_of
from torch import nn

from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.neighbours.dct_adamw import CosineView, cosine_columns
from sparsegrad_cli.methods.neighbours.fira import FiraView
from sparsegrad_cli.methods.neighbours.frugal import FrugalView, drawn_columns
from sparsegrad_cli.methods.neighbours.galore import GaloreView, leading_directions
from sparsegrad_cli.methods.neighbours.gradient_settings import GRADIENTS
from sparsegrad_cli.methods.neighbours.projected import ProjectedAdamW, View
from sparsegrad_cli.recipe.load_recipe import load_recipe

Array = NDArray[np.float64]
LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.99, 1e-8, 0.1
RANK, EVERY, SCALE, GROWTH, FREE, SHARE = 2, 2, 0.7, 1.01, 0.1, 3
SHAPES = [(4, 7), (7, 4), (5, 5)]
PROJECTED = ("galore", "fira", "frugal", "dct_adamw")

VIEWS: dict[str, Callable[[], View]] = {
    "galore": lambda: GaloreView(RANK, EVERY, SCALE),
    "fira": lambda: FiraView(RANK, EVERY, SCALE, GROWTH),
    "frugal": lambda: FrugalView(SHARE, EVERY, FREE, seed=3, number=1),
    "dct_adamw": lambda: CosineView(RANK, EVERY, SCALE),
}


def gradients(shape: tuple[int, int], count: int = 6) -> list[Array]:
    """Return gradients that grow, so that Fira's limiter has something to limit."""
    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape) * (1 + 2 * n) for n in range(count)]


class Adam:
    """Adam's direction as in Kingma & Ba 2015, Algorithm 1."""

    def __init__(self) -> None:
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.age = 0

    def __call__(self, g: Array) -> Array:
        self.age += 1
        self.first = BETA1 * self.first + (1 - BETA1) * g
        self.second = BETA2 * self.second + (1 - BETA2) * g**2
        unbiased = self.first / (1 - BETA1**self.age), self.second / (1 - BETA2**self.age)
        direction: Array = unbiased[0] / (np.sqrt(unbiased[1]) + EPS)
        return direction


def leading(g: Array, like: Array) -> Array:
    """Return eigenvectors of g g' of the largest eigenvalues, with the signs of ``like``."""
    _, vectors = np.linalg.eigh(g @ g.T)
    found = vectors[:, ::-1][:, :RANK]
    signed: Array = found * np.sign((found * like).sum(0))
    return signed


def cosines(n: int) -> Array:
    q = np.array(
        [[math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for k in range(n)] for i in range(n)]
    )
    scaled: Array = q * np.sqrt(np.where(np.arange(n) == 0, 1, 2) / n)
    return scaled


def galore_reference(w: Array, grads: list[Array], held: Iterator[Array], fira: bool) -> Array:
    """The algorithms for w (m, n) with m <= n; ``held`` only fixes the signs of the vectors."""
    adam, p, before = Adam(), np.zeros(0), 0.0
    for t, g in enumerate(grads):
        sign_of = next(held)
        if t % EVERY == 0:
            p = leading(g, sign_of)
        r = p.T @ g
        n = adam(r)
        step = p @ n
        if fira:
            s = (g - p @ r) * (np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + EPS))
            if t > 0:
                s = s * GROWTH / max(np.linalg.norm(s) / (before + EPS), GROWTH)
            before = float(np.linalg.norm(s))
            step = step + s
        w = (1 - LR * DECAY) * w - LR * SCALE * step
    return w


def dct_reference(w: Array, grads: list[Array]) -> Array:
    q = cosines(w.shape[0])
    first = second = np.zeros((RANK, w.shape[1]))
    chosen = np.zeros(0, dtype=int)
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            best = np.sort(np.argsort(-np.linalg.norm(q.T @ g, axis=1))[:RANK])
            if t > 0:
                rotation = q[:, chosen].T @ q[:, best]
                first, second = rotation.T @ first, np.abs(rotation.T @ second)
            chosen = best
        low = q[:, chosen].T @ g
        first = BETA1 * first + (1 - BETA1) * low
        second = BETA2 * second + (1 - BETA2) * low**2
        n = first / (1 - BETA1 ** (t + 1)) / (np.sqrt(second / (1 - BETA2 ** (t + 1))) + EPS)
        w = (1 - LR * DECAY) * w - LR * SCALE * q[:, chosen] @ n
    return w


def frugal_reference(w: Array, grads: list[Array], held: Iterator[Array]) -> Array:
    adam, columns = Adam(), np.zeros(0, dtype=int)
    for t, g in enumerate(grads):
        drawn = next(held).astype(int)
        if t % EVERY == 0:
            adam, columns = Adam(), drawn
        assert (columns == drawn).all(), "drawn again too early"
        step = FREE * np.sign(g)
        step[:, columns] = adam(g[:, columns])
        w = (1 - LR * DECAY) * w - LR * step
    return w


def reference(name: str, w: Array, grads: list[Array], states: list[dict[str, Array]]) -> Array:
    """Return W after all steps, by the papers' formulas."""
    if name == "frugal":
        return frugal_reference(w, grads, (state["columns"] for state in states))
    tall = w.shape[0] > w.shape[1]
    if tall:
        w, grads = w.T, [g.T for g in grads]
    if name == "dct_adamw":
        after = dct_reference(w, grads)
    else:
        held = (state["projection"] for state in states)
        after = galore_reference(w, grads, held, fira=name == "fira")
    return after.T if tall else after


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_six_steps_are_those_of_the_paper(
    name: str, shape: tuple[int, int], transposed: bool
) -> None:
    start = np.random.default_rng(9).standard_normal(shape)
    held = torch.tensor(start.T.copy() if transposed else start)
    weight, head = nn.Parameter(held), nn.Parameter(torch.ones(3))
    plain = nn.Parameter(torch.ones(3))
    views = {weight: VIEWS[name]()}
    optimizer = ProjectedAdamW(
        [weight, head],
        views,
        [weight] if transposed else [],
        lr=LR,
        betas=(BETA1, BETA2),
        eps=EPS,
        weight_decay=DECAY,
    )
    adamw = torch.optim.AdamW([plain], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    grads, states = gradients(shape), []
    for g in grads:
        weight.grad = torch.tensor(g.T.copy() if transposed else g)
        head.grad, plain.grad = (torch.tensor([1.0, -2.0, float(g[0, 0])]) for _ in range(2))
        optimizer.step()
        adamw.step()
        states.append({k: v.double().numpy().copy() for k, v in optimizer.state[weight].items()})
    expected = reference(name, start, grads, states)
    got = weight.detach().numpy()
    np.testing.assert_allclose(got.T if transposed else got, expected, rtol=0, atol=1e-12)
    assert torch.equal(head, plain)


def test_fira_limits_the_growth_of_the_residual() -> None:
    view, norms = FiraView(RANK, EVERY, SCALE, GROWTH), []
    weight = nn.Parameter(torch.zeros(4, 7, dtype=torch.float64))
    optimizer = ProjectedAdamW([weight], {weight: view}, lr=LR)
    for g in gradients((4, 7)):
        weight.grad = torch.tensor(g)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["residual"]))
    growth = [after / before for before, after in pairwise(norms)]
    assert max(growth) == pytest.approx(GROWTH), "the gradients grow faster than the limit"


@pytest.mark.parametrize("size", [1, 2, 5, 384])
def test_the_cosine_matrix_is_orthogonal(size: int) -> None:
    q = cosine_columns(size, torch.arange(size), torch.float64)
    torch.testing.assert_close(q.T @ q, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    np.testing.assert_allclose(q.numpy(), cosines(size), rtol=0, atol=1e-12)
    half = cosine_columns(size, torch.arange(size), torch.float32)
    torch.testing.assert_close(half.double(), q, rtol=0, atol=1e-7)


def test_chosen_cosines_have_the_smallest_error() -> None:
    g = torch.tensor(gradients((5, 7))[0])
    state: dict[str, torch.Tensor] = {}
    view = CosineView(RANK, EVERY, SCALE)
    view.choose(g, state)
    q = cosines(5)
    errors = {}
    for some in combinations(range(5), RANK):
        part = q[:, list(some)]
        errors[some] = float(np.linalg.norm(g.numpy() - part @ part.T @ g.numpy()))
    assert tuple(state["columns"].tolist()) == min(errors, key=errors.__getitem__)


def test_leading_directions_span_the_best_subspace() -> None:
    g = torch.tensor(gradients((5, 7))[0])
    p = leading_directions(g, RANK)
    best = leading(g.numpy(), p.numpy())
    np.testing.assert_allclose(p.numpy(), best, atol=1e-12)
    assert leading_directions(g, 99).shape == (5, 5)
    g[0, 0] = math.nan
    assert bool(leading_directions(g, RANK).isnan().all())


def test_columns_are_drawn_by_seed_target_and_draw() -> None:
    keys = [(seed, number, draw) for seed in (0, 1) for number in (0, 1) for draw in (0, 1)]
    drawn = {key: tuple(drawn_columns(*key, 20, 60).tolist()) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert all(len(set(c)) == 20 and min(c) >= 0 and max(c) < 60 for c in drawn.values())
    assert drawn[0, 0, 0] == tuple(drawn_columns(0, 0, 0, 20, 60).tolist())


# --- settings


def settings(name: str, **more: Any) -> Any:
    return GRADIENTS[name](name=name, **more)


def state_bytes(name: str, targets: Any, size: Any) -> int:
    """Optimizer state of the targets by hand: float32, int64 columns, int32 indices, a counter."""
    total = 0
    for t in targets:
        short, long = sorted((t.out_features, t.in_features))
        if name == "frugal":
            columns = max(1, round(size * t.in_features))
            total += 4 * 2 * t.out_features * columns + 8 * columns + 4
        else:
            r = min(size, short)
            own = {"galore": 4 * short * r, "fira": 4 * short * r + 4, "dct_adamw": 4 * r}[name]
            total += 4 * 2 * r * long + own + 4
    return total


@pytest.mark.parametrize("name", PROJECTED)
def test_state_is_what_the_reference_page_says(name: str) -> None:
    tuned = Tuned(name)
    tuned.steps(4)
    held = {weight_of(tuned.model, t) for t in tuned.targets}
    states = [s for p, s in tuned.optimizer.state.items() if p in held]
    found = sum(v.numel() * v.element_size() for s in states for v in s.values())
    size = tuned.method.settings.share if name == "frugal" else tuned.method.settings.rank
    assert found == state_bytes(name, tuned.targets, size)


@pytest.mark.parametrize("name", PROJECTED)
def test_sizes_grow_the_state_and_train_everything(name: str) -> None:
    targets = targets_of(classifier())
    shapes = TargetShapes(targets)
    sizes = settings(name).size_range(shapes)
    assert sizes.trains_all and sizes.costs_memory
    some = [sizes.least, (sizes.least + sizes.most) // 2, sizes.most]
    at = [settings(name).with_size(size) for size in some]
    assert {s.sizing(shapes).trainable for s in at} == {shapes.parameters}
    bytes_of = [state_bytes(name, targets, s.share if name == "frugal" else s.rank) for s in at]
    assert bytes_of == sorted(set(bytes_of))


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("match=trainable", "match"),
        ("model.quantization=4bit", "method.name"),
        ("init_from=somewhere", "init_from"),
    ],
)
def test_what_cannot_work_is_refused(name: str, override: str, key: str) -> None:
    with pytest.raises((RecipeError, UsageError)) as caught:
        load_recipe(None, (f"method.name={name}", override))
    assert key in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", PROJECTED)
def test_split_matrices_are_refused(name: str) -> None:
    refusal = settings(name).sharding_refusal("FSDP2")
    assert refusal is not None and "FSDP2" in refusal[1]


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_merged_weight_is_the_trained_one(name: str, architecture: str) -> None:
    tuned = Tuned(name, architecture, dtype=torch.bfloat16)
    before = {t.name: t.weight_OI(tuned.model).detach().clone() for t in tuned.targets}
    with torch.autocast("cpu", torch.bfloat16):
        tuned.model(**batch()).loss.backward()
    tuned.optimizer.step()
    for target in tuned.targets:
        merged = tuned.method.merged_OI(tuned.model, target)
        assert merged.dtype == torch.float64
        assert tuple(merged.shape) == (target.out_features, target.in_features)
        moved = (merged - before[target.name].double()).abs()
        assert 0 < float(moved.max()) < 1, "float32 keeps what bfloat16 would round away"
        assert torch.equal(merged, target.weight_OI(tuned.model).detach().double())
