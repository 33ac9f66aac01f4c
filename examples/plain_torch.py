"""Adapt a torch model that is not from transformers, merge, and export as LoRA.

python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F

import sparsegrad_cli as sg


class Net(nn.Module):
    """A residual MLP that classifies points."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 4) for x (N, 32)."""
        return self.head(x + self.down(torch.relu(self.up(x))))


torch.manual_seed(0)
net = Net()
start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
pairs = []
for _ in range(16):
    x = torch.randn(64, 32)
    pairs.append((x, x[:, :4].argmax(1)))

modules = ["up", "down"]
basis = sg.calibrate(net, pairs, loss=F.cross_entropy, target_modules=modules, density=0.05)
model = get_peft_model(net, sg.peft.SparseGradConfig(basis=basis, density=0.05))
optimizer = sg.peft.optimizer(model, lr=1e-2)
for epoch in range(5):
    for x, y in pairs:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

with torch.no_grad():
    expected = model(pairs[0][0])
    config, tensors = convert_to_lora(model, 24)
    plain = Net()
    plain.load_state_dict(start)
    lora: PeftModel = get_peft_model(plain, config)  # needs PEFT, not this package
    set_peft_model_state_dict(lora, tensors)
    print(f"LoRA differs by {(lora(pairs[0][0]) - expected).abs().max():.1e}")
    merged = model.merge_and_unload()
    print(f"merged differs by {(merged(pairs[0][0]) - expected).abs().max():.1e}")
