"""The same method in two forms, and one method as a special case of another."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import (
    METHODS,
    Tuned,
    batch,
    classifier,
    logits,
    orthogonal_bases,
    targets_of,
    weight_of,
)
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Method
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.sparsegrad.rotated import RotatedLinear
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.peft import SparseGradLayer
from sparsegrad_cli.recipe.schema import TrainSection

STEPS = 20


def trained(
    settings: MepropSettings | SparsegradSettings,
    architecture: str,
    scope: str = "head",
    weight_decay: float = 0.0,
    identity: bool = False,
) -> tuple[nn.Module, list[Target], dict[str, Basis], list[float]]:
    """A float64 model after some steps without dropout."""
    model = classifier(architecture, dtype=torch.float64)
    targets = targets_of(model)
    bases = orthogonal_bases(targets)
    if identity:
        bases = {
            t.name: Basis(
                torch.eye(t.out_features).double(),
                torch.eye(t.in_features).double(),
                torch.ones(t.out_features),
                torch.ones(t.in_features),
            )
            for t in targets
        }
    method: Method = settings.implementation()
    method.prepare(model, targets, scope=scope, bases=bases)
    train = TrainSection(learning_rate=5e-3, weight_decay=weight_decay)
    optimizer = method.optimizer(model, train)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, targets, bases, losses


def form(name: str, density: float = 0.05) -> SparsegradSettings:
    """A form at full rank that chooses in every step."""
    rank = {"rank": 1.0} if name == "core" else {}
    settings = {"name": "sparsegrad", "form": name, "density": density, "support": "dynamic"}
    return SparsegradSettings.model_validate({**settings, **rank})


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("scope", ["head", "rest"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_both_forms_walk_the_same_path(architecture: str, scope: str, weight_decay: float) -> None:
    rotated, targets, bases, losses = trained(form("rotated"), architecture, scope, weight_decay)
    plain, _, _, losses_of_plain = trained(form("materialized"), architecture, scope, weight_decay)
    torch.testing.assert_close(losses, losses_of_plain, atol=1e-9, rtol=0)
    start = classifier(architecture, dtype=torch.float64)
    for target in targets:
        basis = bases[target.name]
        core = weight_of(rotated, target).detach()
        back = basis.q_out @ core @ basis.q_in.T  # (out, out) @ (out, in) @ (in, in)
        weight = target.weight_OI(plain).detach()
        torch.testing.assert_close(back, weight, atol=1e-9, rtol=0)
        assert not torch.allclose(weight, target.weight_OI(start), atol=1e-3), "it did move"
    others = dict(plain.named_parameters())
    for name, parameter in rotated.named_parameters():
        if name.removesuffix(".weight") not in {t.name for t in targets}:
            torch.testing.assert_close(parameter, others[name], atol=1e-9, rtol=0)
    torch.testing.assert_close(logits(rotated), logits(plain), atol=1e-9, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("scope", ["head", "rest"])
def test_the_core_at_full_rank_walks_the_path_of_the_papers_layer(
    architecture: str, scope: str
) -> None:
    rotated, targets, bases, losses = trained(form("rotated"), architecture, scope)
    beside, _, _, losses_beside = trained(form("core"), architecture, scope)
    torch.testing.assert_close(losses, losses_beside, atol=1e-9, rtol=0)
    start = classifier(architecture, dtype=torch.float64)
    for target in targets:
        layer = beside.get_submodule(target.name)
        assert isinstance(layer, SparseGradLayer)
        frozen, before = target.weight_OI(beside), target.weight_OI(start)
        assert torch.equal(frozen, before), "W is frozen"
        first = to_core(before.detach(), bases[target.name])
        core = weight_of(rotated, target).detach()
        torch.testing.assert_close(
            first + layer.core_RS("default").detach(), core, atol=1e-9, rtol=0
        )
        assert layer.core_RS("default").abs().max() > 1e-3, "it did move"
    torch.testing.assert_close(logits(rotated), logits(beside), atol=1e-9, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("name", ["rotated", "materialized"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_meprop_entries_is_sparsegrad_in_the_identity_basis(
    architecture: str, name: str, weight_decay: float
) -> None:
    meprop, targets, _, losses = trained(
        MepropSettings(name="meprop", density=0.05), architecture, weight_decay=weight_decay
    )
    sparse, _, _, losses_of_sparse = trained(
        form(name), architecture, weight_decay=weight_decay, identity=True
    )
    torch.testing.assert_close(losses, losses_of_sparse, atol=1e-12, rtol=0)
    for target in targets:
        weight = weight_of(sparse, target).detach()
        if target.transposed and name == "materialized":
            weight = weight.T
        torch.testing.assert_close(weight, target.weight_OI(meprop).detach(), atol=1e-12, rtol=0)


def test_full_density_in_the_identity_basis_is_full_fine_tuning() -> None:
    from sparsegrad_cli.methods.full.settings import FullSettings

    sparse, targets, _, losses = trained(form("materialized", 1.0), "bert", identity=True)
    full, _, _, losses_of_full = trained(FullSettings(name="full"), "bert")  # type: ignore[arg-type]
    torch.testing.assert_close(losses, losses_of_full, atol=1e-12, rtol=0)
    for target in targets:
        torch.testing.assert_close(
            target.weight_OI(sparse), target.weight_OI(full), atol=1e-12, rtol=0
        )


def test_the_choice_does_depend_on_the_basis() -> None:
    """So that agreement above is no accident of a basis that is never used."""
    _, _, _, with_basis = trained(form("materialized"), "bert")
    _, _, _, with_identity = trained(form("materialized"), "bert", identity=True)
    assert with_basis != pytest.approx(with_identity, abs=1e-6)


@pytest.mark.parametrize("name", ["rotated-layer", "materialized-layer"])
def test_only_core_entries_that_were_stepped_differ_from_the_start(name: str) -> None:
    tuned, start = Tuned(name), classifier()
    cores = {}
    for target in tuned.targets:
        basis = tuned.method._bases[target.name]
        cores[target.name] = basis.q_out.T @ target.weight_OI(start).detach() @ basis.q_in
    tuned.steps(4)
    adapter = tuned.method.adapter_tensors(tuned.model)
    for target in tuned.targets:
        positions = adapter[f"positions/{target.name}"].long()
        count = round(0.05 * target.size)
        assert count <= len(positions) <= 4 * count
        basis = tuned.method._bases[target.name]
        weight = weight_of(tuned.model, target).detach()
        core = weight if "rotated" in name else basis.q_out.T @ weight @ basis.q_in
        difference = (core - cores[target.name]).reshape(-1).abs()
        untouched = torch.ones(target.size, dtype=torch.bool)
        untouched[positions] = False
        assert float(difference[untouched].max()) < 1e-5
        assert float(difference[positions].min()) > 0.0


def test_the_adapter_is_as_small_as_what_was_stepped() -> None:
    sizes = {}
    for name in ("full", "meprop-entries", "materialized-layer"):
        tuned = Tuned(name)
        tuned.steps(1)
        tensors = tuned.method.adapter_tensors(tuned.model)
        sizes[name] = sum(t.numel() * t.element_size() for t in tensors.values())
    head, entries = 4 * (2 * 16 + 2), 6 * round(0.05 * 640)
    assert sizes["full"] == head + 4 * 6 * 640
    assert sizes["meprop-entries"] == sizes["materialized-layer"] == head + 8 * entries


def test_bases_are_booked_once_each() -> None:
    for name, count in (("materialized-layer", 12), ("materialized-kind", 4)):
        bases = Tuned(name).prepared.bases
        assert len(bases) == count
        assert sum(b.numel() for b in bases) == count // 2 * (16 * 16 + 40 * 40)


def test_a_basis_shared_by_a_kind_is_moved_once() -> None:
    """Bases read from a file come on the CPU in float32: one copy a kind, not one a target."""
    model = classifier(dtype=torch.float64)
    targets = targets_of(model)
    per_target = orthogonal_bases(targets, torch.float32)
    shared = {
        t.name: per_target[next(u.name for u in targets if u.kind == t.kind)] for t in targets
    }
    prepared = (
        form("materialized").implementation().prepare(model, targets, scope="head", bases=shared)
    )
    assert len(prepared.bases) == 4
    assert {b.dtype for b in prepared.bases} == {torch.float64}


def test_sparsegrad_without_bases_is_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="bases"):
        form("rotated").implementation().prepare(model, targets_of(model), scope="head")


def test_the_rotated_layer_keeps_the_bias_parameter_and_leaves_bases_out_of_the_state() -> None:
    tuned = Tuned("rotated-layer")
    base = classifier()
    for target in tuned.targets:
        layer = tuned.model.get_submodule(target.name)
        assert isinstance(layer, RotatedLinear)
        assert set(layer.state_dict()) == {"weight", "bias"}
        assert torch.equal(layer.bias, base.get_submodule(target.name).bias)  # type: ignore[arg-type]


def test_a_layer_without_bias() -> None:
    for name in METHODS:
        tuned = Tuned(name, "llama")  # LLaMA's projections have none
        losses = tuned.steps(3)
        assert all(loss == loss for loss in losses)
        assert not any(n.endswith(".bias") for n, _ in tuned.model.named_parameters())


def test_methods_do_not_touch_what_is_no_target() -> None:
    """Targets of one block only: the layers of the others keep their class and weights."""
    for name in ("meprop-rows", "rotated-layer", "lora"):
        model = classifier()
        targets = targets_of(model, blocks=(1,))
        bases = orthogonal_bases(targets, torch.float32)
        METHODS[name][0].implementation().prepare(model, targets, scope="head", bases=bases)
        classes: dict[str, type] = {
            n: type(m) for n, m in model.named_modules() if n.endswith("intermediate.dense")
        }
        kinds = list(classes.values())
        assert kinds[0] is kinds[2] is nn.Linear
        assert kinds[1] is not nn.Linear


def test_gradients_flow_to_layers_below_a_rotated_one() -> None:
    """dL/dx of the rotated layer is g W: the embedding's gradient equals the plain model's."""

    def embedding_gradient(model: nn.Module) -> Tensor:
        embedding = model.get_parameter("bert.embeddings.word_embeddings.weight")
        embedding.requires_grad_(True)
        model(**batch()).loss.backward()
        assert embedding.grad is not None
        return embedding.grad

    model = classifier(dtype=torch.float64)
    targets = targets_of(model)
    form("rotated").implementation().prepare(
        model, targets, scope="head", bases=orthogonal_bases(targets)
    )
    expected = embedding_gradient(classifier(dtype=torch.float64))
    torch.testing.assert_close(embedding_gradient(model), expected, atol=1e-12, rtol=0)
