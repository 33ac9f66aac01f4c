"""The targets of many architectures: kind, number and shapes, each written out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from support.architectures import TABLE, WITHOUT_MLP, causal_or_body
from support.tiny_models import targets_of
from torch import nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.targets import (
    has_experts,
    not_adapted,
    not_adapted_note,
)
from sparsegrad_cli.recipe.schema import TargetsSection


@pytest.mark.parametrize("architecture", TABLE)
def test_targets_and_what_they_leave_out(architecture: str) -> None:
    model_type, settings, expected, left_out = TABLE[architecture]
    model = causal_or_body(model_type, settings)
    targets = targets_of(model)
    found = Counter((t.kind, t.out_features, t.in_features) for t in targets)
    assert {kind: (n, out, width) for (kind, out, width), n in found.items()} == expected
    others = not_adapted(model, targets, TargetsSection())
    assert {other.kind: other.shape for other in others} == left_out
    assert has_experts(model) == bool(left_out)


@pytest.mark.parametrize("architecture", WITHOUT_MLP)
def test_a_model_without_a_dense_mlp_is_refused(architecture: str) -> None:
    model = causal_or_body(*WITHOUT_MLP[architecture])
    with pytest.raises(UsageError, match="no MLP was recognised") as caught:
        targets_of(model)
    assert ("mlp.experts.gate_up_proj (2 of 4 x" in str(caught.value)) == has_experts_by_name(model)
    assert "name layers by pattern" in str(caught.value.fix)


def has_experts_by_name(model: nn.Module) -> bool:
    return any("experts" in name for name, _ in model.named_parameters())


def test_the_note_names_experts_and_counts_their_parameters() -> None:
    model_type, settings, *_ = TABLE["qwen3_moe"]
    model = causal_or_body(model_type, settings)
    section = TargetsSection(modules=("*.q_proj",))  # who chooses layers still cannot choose these
    left_out = not_adapted(model, targets_of(model, modules=("*.q_proj",)), section)
    note = not_adapted_note(left_out, "head")
    assert "trained whole by scope: rest" in not_adapted_note(left_out, "rest")
    assert "trained whole" not in note
    assert "mlp.experts.gate_up_proj (1 of 4 x 48 x 32, 6,144 parameters)" in note
    assert "mlp.experts.down_proj (1 of 4 x 32 x 24, 3,072 parameters)" in note
    assert "gate_proj" not in note.replace("gate_up_proj", "")
    assert not_adapted_note([], "head") == ""


class Mixer(nn.Module):
    """The shapes of a fused MLP, but it mixes tokens by a convolution, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(8, 24), nn.Linear(12, 8)
        self.conv = nn.Conv1d(12, 12, 3, groups=12)


class Heads(nn.Module):
    """An attention by its attribute's name alone, wider than the hidden size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 40), nn.Linear(20, 8)
        self.back = nn.Linear(20, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.attn = Mixer(), Heads()
        self.ffn = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))
        self.alone = nn.Linear(8, 20 + 20)  # fused with nothing in its own module


def test_attention_and_mixers_are_never_a_partner() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    targets = targets_of(model)
    assert [t.kind for t in targets] == ["ffn.0", "ffn.2"] * 2
    note = not_adapted_note(not_adapted(model, targets, TargetsSection()), "head")
    assert "alone (2 of 40 x 8, 640 parameters)" in note
    assert "mixer.in_proj (2 of 24 x 8, 384 parameters)" in note
    assert "attn" not in note
