"""One call that saves memory on a PEFT model, and PEFT's own gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.peft_models import trained, wrapped
from support.tiny_models import batch, classifier, logits, targets_of
from torch import Tensor, nn

import sparsegrad_cli.peft as sg

# A gated MLP, one with dropout in its module (which cannot be recomputed alone), and Conv1D.
MODELS = ("llama", "bert", "gpt2")


def with_lora(architecture: str) -> nn.Module:
    model = classifier(architecture)
    names = [target.name for target in targets_of(model)]
    made: nn.Module = get_peft_model(model, LoraConfig(target_modules=names, lora_dropout=0.1))
    return made


MAKERS: dict[str, Callable[[str], nn.Module]] = {
    "static": lambda architecture: wrapped(architecture),
    "dynamic": lambda architecture: wrapped(architecture, support="dynamic"),
    "lora": with_lora,
}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of one training step with dropout."""
    model.train().zero_grad()
    torch.manual_seed(0)
    loss = model(**batch(seed=5)).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def moved(model: nn.Module) -> nn.Module:
    """Return the model with all parameters that train away from zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for layer in model.modules():
        if isinstance(layer, sg.SparseGradLayer) and layer.needs_optimizer:
            sg.optimizer(model)
            break
    return model


@pytest.mark.parametrize("recompute", ["none", "activation"])
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("maker", MAKERS)
def test_outputs_and_gradients_stay_the_same_bits(
    maker: str, architecture: str, recompute: Any
) -> None:
    model = moved(MAKERS[maker](architecture))
    before, (loss, grads) = logits(model), step(model)
    changed = sg.save_memory(model, recompute=recompute)
    assert torch.equal(logits(model), before)
    loss_after, grads_after = step(model)
    assert torch.equal(loss_after, loss) and grads_after.keys() == grads.keys() != set()
    assert all(torch.equal(grads_after[name], grads[name]) for name in grads)
    assert (changed["gated_mlps"] > 0) == (architecture == "llama")
    assert (changed["recomputed_mlps"] > 0) == (recompute == "activation")
    assert (changed["dropouts"] > 0) == (architecture != "llama" or maker == "lora")


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of all storages that autograd keeps, without those of parameters."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(**batch(size=16, length=24)).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_it_saves_memory(architecture: str) -> None:
    plain, saving, recomputing = (moved(wrapped(architecture)) for _ in range(3))
    sg.save_memory(saving)
    sg.save_memory(recomputing, recompute="activation")
    assert saved_bytes(recomputing) < saved_bytes(saving) < saved_bytes(plain)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_bases_in_the_dtype_of_autocast_change_no_bit_under_it(architecture: str) -> None:
    model = moved(wrapped(architecture))
    layers = [m for m in model.modules() if isinstance(m, sg.SparseGradLayer)]
    sides = [side for layer in layers for side in (layer.sparsegrad_q_out, layer.sparsegrad_q_in)]
    first, *others = (layer.sparsegrad_q_out for layer in layers)
    second = next(q_out for q_out in others if q_out["default"].shape == first["default"].shape)
    second["default"] = first["default"]
    with torch.autocast("cpu", torch.bfloat16):
        before, (loss, grads) = logits(model), step(model)
    assert sg.save_memory(model, autocast=torch.bfloat16)["bases"] == len(sides) - 1
    assert {side["default"].dtype for side in sides} == {torch.bfloat16}
    assert second["default"] is first["default"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), before)
        loss_after, grads_after = step(model)
    assert torch.equal(loss_after, loss) and grads_after.keys() == grads.keys() != set()
    assert all(torch.equal(grads_after[name], grads[name]) for name in grads)
    assert sg.save_memory(model, autocast=torch.bfloat16)["bases"] == 0


def test_a_second_call_changes_nothing() -> None:
    model = moved(wrapped("llama"))
    sg.save_memory(model, recompute="activation")
    before = [module.forward for module in model.modules() if "forward" in vars(module)]
    again = sg.save_memory(model, recompute="activation")
    assert again["gated_mlps"] == again["dropouts"] == 0
    assert before == [module.forward for module in model.modules() if "forward" in vars(module)]


def test_what_it_cannot_do_is_refused() -> None:
    model = wrapped("llama")
    with pytest.raises(ValueError, match="expected 'none' or 'activation'"):
        sg.save_memory(model, recompute="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float32: expected torch\.bfloat16"):
        sg.save_memory(model, autocast=torch.float32)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4))
    assert sg.save_memory(net)["dropouts"] == 1
    with pytest.raises(ValueError, match="gradient_checkpointing_enable"):
        sg.save_memory(net, recompute="activation")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("support", ["static", "dynamic"])
def test_gradient_checkpointing_changes_no_gradient(
    support: str, architecture: str, reentrant: bool
) -> None:
    model = trained(wrapped(architecture, support=support))
    loss, grads = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_after, grads_after = step(model)
    assert torch.equal(loss_after, loss) and grads_after.keys() == grads.keys() != set()
    assert all(torch.equal(grads_after[name], grads[name]) for name in grads)
