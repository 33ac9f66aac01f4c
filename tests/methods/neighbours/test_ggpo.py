"""LoRA-GGPO against its formula in float64: the noise is drawn again for the reference."""

from __future__ import annotations

import torch
from support.one_layer import OneLayer, Parameters, ReferenceAdamW, drawn
from torch import Tensor
from torch.nn import functional as F

from sparsegrad_cli.methods.neighbours.adaptive_settings import GgpoSettings
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.numerics.weight_noise import noise_seed, row_noise

SCALE, SIGMA, BETA = 4 / 3, 0.5, 0.3
SETTINGS = GgpoSettings(name="lora_ggpo", rank=3, alpha=4, sigma=SIGMA, beta=BETA)


def deviations(weight_OI: Tensor, p: Parameters, gradient_OI: Tensor | None) -> Tensor:
    """Row by row, with the whole matrix G."""
    found = []
    for i, row in enumerate(weight_OI + SCALE * p["b"] @ p["a"]):
        square = row @ row
        if gradient_OI is not None:
            square = square + BETA * gradient_OI[i] @ gradient_OI[i]
        found.append(SIGMA * (square / weight_OI.shape[1]).sqrt())
    return torch.stack(found)


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(SETTINGS)
    assert not one.start["b"].any() and one.start["a"].all()
    reference, gradient_OI = ReferenceAdamW(one.start), None
    with temporary_seed(8):
        for step in range(4):
            p = reference.p
            deviations_O = deviations(one.weight_OI, p, gradient_OI)
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            normal_OI = torch.empty(6, 5, dtype=torch.float64).normal_(generator=generator)
            noise_OI = normal_OI * deviations_O[:, None]
            assert noise_OI.abs().max() > 0.1
            g_OI = one.weight_gradient_OI(step, SCALE * p["b"] @ p["a"] + noise_OI)
            pulled = {"b": SCALE * g_OI @ p["a"].T, "a": SCALE * p["b"].T @ g_OI}
            reference.step(pulled)
            after = reference.p
            gradient_OI = SCALE * (pulled["b"] @ after["a"] + after["b"] @ pulled["a"])
    with temporary_seed(8):
        one.steps(4)
    for name, parameter in one.parameters().items():
        torch.testing.assert_close(parameter, reference.p[name], rtol=1e-9, atol=1e-11)
    expected_O = deviations(one.weight_OI, reference.p, gradient_OI)
    torch.testing.assert_close(one.layer.change.noise, expected_O)


def test_the_gradient_of_the_input_passes_through_the_noisy_weight() -> None:
    one = OneLayer(SETTINGS)
    one.steps(2)
    x_NI = drawn(4, one.inn, seed=7).requires_grad_()
    with temporary_seed(5):
        one.layer(x_NI).sum().backward()
    with temporary_seed(5):
        noise_OI = row_noise(noise_seed(), one.layer.change.noise, one.inn)
    weight_OI = one.method.merged_OI(one.model, one.target) + noise_OI
    torch.testing.assert_close(x_NI.grad, torch.ones(4, one.out, dtype=torch.float64) @ weight_OI)


def test_there_is_no_noise_outside_training_or_in_what_is_exported() -> None:
    one = OneLayer(SETTINGS)
    one.steps(2)
    x_NI = drawn(4, one.inn, seed=7)
    merged_OI = one.method.merged_OI(one.model, one.target)
    plain_NO = F.linear(x_NI, merged_OI, one.bias_O)
    assert not torch.allclose(one.layer(x_NI), plain_NO, atol=0.1)
    with torch.no_grad():
        torch.testing.assert_close(one.layer(x_NI), plain_NO)
    one.model.eval()
    torch.testing.assert_close(one.layer(x_NI), plain_NO)


def test_rows_of_the_noise_have_their_deviations() -> None:
    deviations_O = torch.tensor([0.0, 0.5, 3.0])
    with temporary_seed(1):
        drawn_OI = row_noise(noise_seed(), deviations_O, 20_000)
    torch.testing.assert_close(drawn_OI.std(1), deviations_O, rtol=0.03, atol=1e-6)
    assert drawn_OI.mean(1).abs().max() < 0.1
