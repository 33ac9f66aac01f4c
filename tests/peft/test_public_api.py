"""The Python API as its users write it: calibrate, wrap, train, save, load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_models import batch, batches, classifier, logits, snapshot
from torch import nn
from torch.nn import functional as F

import sparsegrad_cli as sg
from sparsegrad_cli.errors import UsageError


class Net(nn.Module):
    """A torch model that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 48), nn.Linear(48, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return hidden


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        x = torch.randn(16, 12, generator=generator)
        found.append((x, x[:, :3].argmax(1)))
    return found


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def test_a_transformer_is_calibrated_wrapped_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = classifier("bert")
    before = snapshot(model)
    basis = sg.calibrate(model, batches(), steps=4, density=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    basis.save(tmp_path / "basis.safetensors")
    again = sg.load_basis(tmp_path / "basis.safetensors")
    config = sg.peft.SparseGradConfig(basis=again, density=0.05, task_type="SEQ_CLS")
    tuned = get_peft_model(model, config)
    optimizer = sg.peft.optimizer(tuned, lr=3e-3)
    losses = []
    for step in range(30):
        loss = tuned(**batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(classifier("bert"), tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(tuned.eval()))


@pytest.mark.parametrize("support", ["static", "dynamic", "refresh"])
def test_a_plain_torch_model_trains_on_pairs(support: Any) -> None:
    model = net()
    basis = sg.calibrate(
        model, pairs(8), loss=F.cross_entropy, target_modules=["up", "down"], density=0.1
    )
    assert sorted(basis.by_target()) == ["down", "up"]
    config = sg.peft.SparseGradConfig(
        basis=basis, density=0.1, support=support, modules_to_save=["head"]
    )
    tuned = get_peft_model(model, config)
    optimizer = sg.peft.optimizer(tuned, lr=1e-2)
    losses = []
    for _ in range(3):
        for x, y in pairs(8):
            loss = F.cross_entropy(tuned(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_the_trained_share_is_the_density_of_each_module() -> None:
    model = net()
    modules = ["up", "down"]
    basis = sg.calibrate(model, pairs(4), loss=F.cross_entropy, target_modules=modules, density=0.1)
    tuned = get_peft_model(model, sg.peft.SparseGradConfig(basis=basis, density=0.1))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trained == 2 * round(0.1 * 12 * 48)


@pytest.mark.parametrize("modules", [r".*(intermediate|output)\.dense", None, ["output.dense"]])
def test_target_modules_are_a_pattern_names_or_those_of_the_basis(modules: Any) -> None:
    model = classifier("bert", num_hidden_layers=12)
    names = [
        f"bert.encoder.layer.{n}.{m}.dense" for n in range(12) for m in ("intermediate", "output")
    ]
    basis = sg.calibrate(model, batches(), steps=2, density=0.05, target_modules=names)
    chosen = sg.peft.SparseGradConfig(
        basis=basis, density=0.05, target_modules=modules, exclude_modules=r".*attention.*"
    )
    tuned = get_peft_model(model, chosen)
    found = sum(isinstance(module, sg.peft.SparseGradLayer) for module in tuned.modules())
    assert found == (12 if isinstance(modules, list) else 24)


def test_bad_calls_say_what_was_expected() -> None:
    with pytest.raises(UsageError, match="matches no linear layer"):
        sg.calibrate(net(), pairs(1), loss=F.cross_entropy, target_modules=["nothing"])
    with pytest.raises(ValueError, match="got no batches"):
        sg.calibrate(net(), [], loss=F.cross_entropy, target_modules=["up"])
    with pytest.raises(ValueError, match="for pairs, pass loss="):
        sg.calibrate(net(), pairs(1), target_modules=["up"])
    with pytest.raises(ValueError, match="needs a basis"):
        get_peft_model(net(), sg.peft.SparseGradConfig(target_modules=["up"]))
    basis = sg.calibrate(net(), pairs(1), loss=F.cross_entropy, target_modules=["up"])
    with pytest.raises(ValueError, match="covers 1 modules and not down"):
        get_peft_model(net(), sg.peft.SparseGradConfig(basis=basis, target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="holds 8 directions and the core needs 16"):
        get_peft_model(net(), sg.peft.SparseGradConfig(basis=basis, rank=16))
    tuned = get_peft_model(net(), sg.peft.SparseGradConfig(basis=basis))
    layers = tuned.peft_config["default"].layers
    empty = get_peft_model(net(), sg.peft.SparseGradConfig(layers=layers))
    with pytest.raises(ValueError, match="has no bases yet"):
        sg.peft.optimizer(empty)
    with pytest.raises(ValueError, match="refresh_steps needs support='refresh'"):
        sg.peft.SparseGradConfig(basis=basis, refresh_steps=3)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, sparsegrad_cli; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_parameter_groups_separate_values_and_head_and_spare_biases_from_decay() -> None:
    model = classifier("bert")
    basis = sg.calibrate(model, batches(), steps=2, density=0.05)
    config = sg.peft.SparseGradConfig(basis=basis, density=0.05, task_type="SEQ_CLS")
    tuned = get_peft_model(model, config)
    groups = sg.peft.parameter_groups(tuned, lr=1e-3, head_lr=1e-4, weight_decay=0.1)
    found = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {
        "values": (1e-3, 0.1, len(basis.by_target())),
        "head": (1e-4, 0.1, 1),
        "head without decay": (1e-4, 0.0, 1),
    }
