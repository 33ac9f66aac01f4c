"""SelectiveAdamW: selection once per optimizer step, state that survives, plain AdamW beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import METHODS, Tuned, batch, classifier, targets_of, weight_of
from torch import Tensor, nn

from sparsegrad_cli.methods.meprop.method import Meprop
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.sparsegrad.rotated import Sparsegrad
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW
from sparsegrad_cli.recipe.schema import TrainSection

SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.97), "eps": 1e-8, "weight_decay": 0.1}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, p in enumerate(parameters):
            p.grad = normal(*p.shape, seed=1000 * number + step, dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_parameters_are_bitwise_torch_adamw(dtype: torch.dtype) -> None:
    chosen, plain = parameter(3, 4, dtype=dtype), parameter(5, seed=1, dtype=dtype)
    reference = nn.Parameter(plain.detach().clone())
    optimizer = SelectiveAdamW([chosen, plain], {chosen: Selection(2)}, **SETTINGS)
    run(optimizer, [chosen, plain], range(20))
    torch_optimizer = torch.optim.AdamW([reference], foreach=False, **SETTINGS)
    for step in range(20):
        reference.grad = normal(5, seed=1000 + step, dtype=dtype)
        torch_optimizer.step()
    assert torch.equal(plain, reference)


def test_choosing_all_entries_is_torch_adamw() -> None:
    chosen = parameter(3, 4)
    reference = nn.Parameter(chosen.detach().clone())
    run(SelectiveAdamW([chosen], {chosen: Selection(12)}, **SETTINGS), [chosen], range(20))
    run(torch.optim.AdamW([reference], foreach=False, **SETTINGS), [reference], range(20))
    torch.testing.assert_close(chosen, reference, atol=1e-12, rtol=0)


def test_all_entries_of_the_identity_basis_are_torch_adamw() -> None:
    chosen = parameter(3, 4)
    reference = nn.Parameter(chosen.detach().clone())
    basis = Basis(torch.eye(3).double(), torch.eye(4).double(), torch.ones(3), torch.ones(4))
    run(SelectiveAdamW([chosen], {chosen: Selection(12, basis)}, **SETTINGS), [chosen], range(20))
    run(torch.optim.AdamW([reference], foreach=False, **SETTINGS), [reference], range(20))
    torch.testing.assert_close(chosen, reference, atol=1e-12, rtol=0)


def test_exactly_count_entries_move_and_the_rest_stay_bitwise_also_with_weight_decay() -> None:
    chosen = parameter(6, 5, dtype=torch.float32)
    before = chosen.detach().clone()
    optimizer = SelectiveAdamW([chosen], {chosen: Selection(4)}, **SETTINGS)
    run(optimizer, [chosen], range(1))
    assert int((chosen.detach() != before).sum()) == 4
    state = optimizer.state[chosen]
    for key in ("exp_avg", "exp_avg_sq", "age"):
        assert int((state[key] != 0).sum()) == 4
    largest = normal(6, 5, seed=0).abs().reshape(-1).topk(4).indices.sort().values
    assert torch.equal(optimizer.touched(chosen), largest)


def test_weight_decay_acts_on_chosen_core_values() -> None:
    """One step with a basis, by hand: core value c moves by -lr sign(g) - lr wd c."""
    weight = parameter(3, 2)
    q_out, q_in = torch.linalg.qr(normal(3, 3, seed=7)).Q, torch.linalg.qr(normal(2, 2, seed=8)).Q
    basis = Basis(q_out, q_in, torch.ones(3), torch.ones(2))
    core, grad = q_out.T @ weight.detach() @ q_in, normal(3, 2, seed=9)
    core_grad = q_out.T @ grad @ q_in
    row, column = divmod(int(core_grad.abs().argmax()), 2)
    expected = core.clone()
    g = core_grad[row, column]
    expected[row, column] -= 0.05 * g / (g.abs() + 1e-8) + 0.05 * 0.1 * core[row, column]
    weight.grad = grad
    SelectiveAdamW([weight], {weight: Selection(1, basis)}, **SETTINGS).step()
    torch.testing.assert_close(q_out.T @ weight.detach() @ q_in, expected, atol=1e-12, rtol=0)


def test_a_transposed_weight_takes_the_transposed_step() -> None:
    plain = parameter(3, 2)
    stored = nn.Parameter(plain.detach().T.contiguous())
    q_out, q_in = torch.linalg.qr(normal(3, 3, seed=7)).Q, torch.linalg.qr(normal(2, 2, seed=8)).Q
    basis = Basis(q_out, q_in, torch.ones(3), torch.ones(2))
    first = SelectiveAdamW([plain], {plain: Selection(2, basis)}, **SETTINGS)
    second = SelectiveAdamW([stored], {stored: Selection(2, basis, transposed=True)}, **SETTINGS)
    for step in range(5):
        plain.grad = normal(3, 2, seed=step)
        stored.grad = normal(3, 2, seed=step).T.contiguous()
        first.step()
        second.step()
    torch.testing.assert_close(stored.detach().T, plain.detach(), atol=1e-13, rtol=0)
    assert second.state[stored]["exp_avg"].shape == (3, 2), "moments live in the core"
    assert stored.is_contiguous()


def test_parameters_without_a_gradient_are_left_alone() -> None:
    chosen, plain = parameter(3, 4), parameter(5, seed=1)
    before = chosen.detach().clone(), plain.detach().clone()
    optimizer = SelectiveAdamW([chosen, plain], {chosen: Selection(2)}, **SETTINGS)
    optimizer.step()
    assert torch.equal(chosen, before[0]) and torch.equal(plain, before[1])
    assert optimizer.touched(chosen).numel() == 0


def test_none_takes_the_entries_that_have_a_gradient() -> None:
    chosen = parameter(3, 4)
    before = chosen.detach().clone()
    chosen.grad = torch.zeros(3, 4).double()
    chosen.grad[1] = 1.0
    optimizer = SelectiveAdamW([chosen], {chosen: Selection(None)}, **SETTINGS)
    optimizer.step()
    assert optimizer.touched(chosen).tolist() == [4, 5, 6, 7]
    assert torch.equal(chosen[0], before[0]) and torch.equal(chosen[2], before[2])


def test_closure_and_learning_rate_schedule() -> None:
    chosen = parameter(2, 2)
    optimizer = SelectiveAdamW([chosen], {chosen: Selection(1)}, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (chosen * torch.tensor([[0.0, 0.0], [0.0, 2.0]])).sum()
        loss.backward()
        return float(loss.detach())

    start, moved = float(chosen.detach()[1, 1]), []
    for _ in range(3):
        before = float(chosen.detach()[1, 1])
        assert optimizer.step(closure) == pytest.approx(2 * before)
        schedule.step()
        moved.append(before - float(chosen.detach()[1, 1]))
    assert moved == pytest.approx([0.1, 0.05, 0.025], rel=1e-6)
    assert float(chosen.detach()[1, 1]) == pytest.approx(start - 0.175)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_goes_on_bitwise_and_keeps_integer_ages(dtype: torch.dtype) -> None:
    def fresh() -> tuple[SelectiveAdamW, list[nn.Parameter]]:
        entries, core = parameter(6, 5, dtype=dtype), parameter(4, 3, seed=2, dtype=dtype)
        plain = parameter(5, seed=1, dtype=dtype)
        q_out, q_in = (torch.linalg.qr(normal(n, n, seed=n)).Q.to(dtype) for n in (4, 3))
        basis = Basis(q_out, q_in, torch.ones(4), torch.ones(3))
        if dtype == torch.bfloat16:  # sparse products have no bfloat16: entries only
            return SelectiveAdamW([entries, plain], {entries: Selection(4)}, **SETTINGS), [
                entries,
                plain,
            ]
        selections = {entries: Selection(4), core: Selection(2, basis)}
        return SelectiveAdamW([entries, core, plain], selections, **SETTINGS), [
            entries,
            core,
            plain,
        ]

    whole, expected = fresh()
    run(whole, expected, range(600))
    first, parameters = fresh()
    run(first, parameters, range(300))
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    for source, copy in zip(parameters, resumed, strict=True):
        copy.data.copy_(source.data)
    age = second.state[resumed[0]]["age"]
    assert age.dtype == torch.int32
    assert int(age.sum()) == 4 * 300
    assert second.state[resumed[0]]["exp_avg"].dtype == first.state[parameters[0]]["exp_avg"].dtype
    run(second, resumed, range(300, 600))
    for got, want in zip(resumed, expected, strict=True):
        assert torch.equal(got, want)


def accumulate(
    settings: MepropSettings | SparsegradSettings, micro: int
) -> tuple[nn.Module, Tensor]:
    """One optimizer step on 8 examples in ``micro`` backward passes; weights, ages."""
    model = classifier(dtype=torch.float64)
    targets = targets_of(model)
    bases = None
    method = settings.implementation()
    if settings.calibrates:
        bases = {
            t.name: Basis(
                torch.linalg.qr(normal(t.out_features, t.out_features, seed=3)).Q,
                torch.linalg.qr(normal(t.in_features, t.in_features, seed=4)).Q,
                torch.ones(t.out_features),
                torch.ones(t.in_features),
            )
            for t in targets
        }
    method.prepare(model, targets, scope="head", bases=bases)
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-2))
    inputs, size = batch(8), 8 // micro
    for start in range(0, 8, size):
        part = {k: v[start : start + size] for k, v in inputs.items()}
        (model(**part).loss / micro).backward()
    optimizer.step()
    weights = [weight_of(model, t) for t in targets]
    ages = torch.cat([optimizer.state[w]["age"].reshape(-1) for w in weights])
    return model, ages


@pytest.mark.parametrize(
    "settings",
    [METHODS[n][0] for n in ("meprop-entries", "materialized-layer", "rotated-layer")],
    ids=["meprop", "materialized", "rotated"],
)
def test_accumulation_selects_once_on_the_accumulated_gradient(
    settings: MepropSettings | SparsegradSettings,
) -> None:
    one, ages = accumulate(settings, 1)
    four, ages_of_four = accumulate(settings, 4)
    assert torch.equal(ages, ages_of_four)
    assert set(ages.tolist()) == {0, 1}
    assert settings.density is not None
    assert int(ages.sum()) == 6 * round(settings.density * 16 * 40)
    for (name, expected), (_, got) in zip(
        one.named_parameters(), four.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=0, msg=name)


def test_methods_give_the_recipes_hyper_parameters_to_the_optimizer() -> None:
    train = TrainSection(
        learning_rate=0.3, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-5, weight_decay=0.2
    )
    for name in METHODS:
        for group in Tuned(name, train=train).optimizer.param_groups:
            assert group["lr"] == 0.3
            assert group["betas"] == (0.7, 0.8)
            assert group["eps"] == 1e-5


# Every method on BERT, and one of each kind of optimizer on the other architectures.
DECAYING = [(name, "bert") for name in METHODS] + [
    (name, architecture)
    for name in ("full", "core-static", "core-dynamic")
    for architecture in ("distilbert", "gpt2", "llama")
]


@pytest.mark.parametrize(("name", "architecture"), DECAYING)
def test_biases_and_norms_do_not_decay_as_in_transformers(name: str, architecture: str) -> None:
    from transformers import Trainer

    train = TrainSection(weight_decay=0.2)
    tuned = Tuned(name, architecture, scope="rest", train=train)
    decays = {
        id(parameter)
        for group in tuned.optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    expected = Trainer.get_decay_parameter_names(None, tuned.model)
    trained = {n: p for n, p in tuned.model.named_parameters() if p.requires_grad}
    # SoRA's and DiffoRA's gates have a rule of their own.
    trained = {n: p for n, p in trained.items() if not n.endswith("change.gate")}
    assert {n for n, p in trained.items() if id(p) in decays} == set(expected) & set(trained)
    assert not any("bias" in n or "LayerNorm" in n for n, p in trained.items() if id(p) in decays)
    assert {group["weight_decay"] for group in tuned.optimizer.param_groups} == {0.2, 0.0}


@pytest.mark.parametrize("name", ["full", "meprop-entries", "core-static", "core-dynamic"])
def test_a_step_without_gradients_shrinks_what_decays_and_nothing_else(name: str) -> None:
    train = TrainSection(weight_decay=0.5, learning_rate=0.1)
    tuned = Tuned(name, scope="rest", train=train)
    trained = {n: p for n, p in tuned.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    tuned.optimizer.step()
    for n in ("bert.pooler.dense.bias", "bert.embeddings.LayerNorm.weight", "classifier.bias"):
        assert torch.equal(trained[n], before[n])
    for n in ("bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"):
        torch.testing.assert_close(trained[n].detach(), before[n] * 0.95)


def test_every_trainable_parameter_is_in_the_optimizer_once() -> None:
    for name in METHODS:
        for scope in ("head", "rest"):
            tuned = Tuned(name, scope=scope)
            held = [id(p) for g in tuned.optimizer.param_groups for p in g["params"]]
            assert len(held) == len(set(held))
            assert set(held) == {id(p) for p in tuned.model.parameters() if p.requires_grad}


def test_state_of_chosen_parameters_is_three_tensors_of_the_core() -> None:
    for settings in (
        MepropSettings(name="meprop"),
        SparsegradSettings(name="sparsegrad", form="materialized"),
    ):
        method = settings.implementation()
        assert isinstance(method, Meprop | Sparsegrad)
    tuned = Tuned("materialized-layer")
    tuned.steps(2)
    assert isinstance(tuned.optimizer, SelectiveAdamW)
    for target in tuned.targets:
        state = tuned.optimizer.state[weight_of(tuned.model, target)]
        assert set(state) == {"exp_avg", "exp_avg_sq", "age"}
        assert state["age"].shape == (target.out_features, target.in_features)
