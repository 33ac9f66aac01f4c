"""MLP layers by structure: what is found in each architecture is written out by hand."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import (
    ARCHITECTURES,
    BLOCKS,
    HIDDEN,
    INNER,
    build,
    classifier,
    config,
    targets_of,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.targets import (
    find_blocks,
    find_targets,
    freeze,
)
from sparsegrad_cli.recipe.schema import TargetsSection

UP, DOWN = (INNER, HIDDEN), (HIDDEN, INNER)
_BERT = ("encoder.layer", {"intermediate.dense": UP, "output.dense": DOWN})
_GATED = {"mlp.gate_proj": UP, "mlp.up_proj": UP, "mlp.down_proj": DOWN}

# architecture -> (path of the list of blocks, kind -> (out, in))
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "bert": (f"bert.{_BERT[0]}", _BERT[1]),
    "roberta": (f"roberta.{_BERT[0]}", _BERT[1]),
    "electra": (f"electra.{_BERT[0]}", _BERT[1]),
    "mpnet": (f"mpnet.{_BERT[0]}", _BERT[1]),
    "deberta-v3": (f"deberta.{_BERT[0]}", _BERT[1]),
    "distilbert": ("distilbert.transformer.layer", {"ffn.lin1": UP, "ffn.lin2": DOWN}),
    "gpt2": ("transformer.h", {"mlp.c_fc": UP, "mlp.c_proj": DOWN}),
    "llama": ("model.layers", _GATED),
    "mistral": ("model.layers", _GATED),
    "qwen2": ("model.layers", _GATED),
    "qwen3": ("model.layers", _GATED),
    "gemma": ("model.layers", _GATED),
    "opt": ("model.decoder.layers", {"fc1": UP, "fc2": DOWN}),
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_exactly_the_mlp_layers_are_found(architecture: str) -> None:
    path, kinds = EXPECTED[architecture]
    targets = targets_of(classifier(architecture))
    expected = [
        (f"{path}.{block}.{kind}", kind, block, *shape)
        for block in range(BLOCKS)
        for kind, shape in kinds.items()
    ]
    got = [(t.name, t.kind, t.block, t.out_features, t.in_features) for t in targets]
    assert got == expected
    assert {t.transposed for t in targets} == {architecture == "gpt2"}
    assert all(t.size == HIDDEN * INNER for t in targets)


def test_every_architecture_is_expected_by_hand() -> None:
    assert set(EXPECTED) | {"t5"} == set(ARCHITECTURES)


def test_t5_encoder_whose_attention_is_not_square() -> None:
    from transformers import T5EncoderModel

    targets = targets_of(build(T5EncoderModel, config("t5")))
    assert [t.name for t in targets] == [
        f"encoder.block.{n}.layer.1.DenseReluDense.{part}"
        for n in range(BLOCKS)
        for part in ("wi", "wo")
    ]


def test_t5_with_a_decoder_takes_both_stacks() -> None:
    targets = targets_of(classifier("t5"))
    assert [t.name.split(".")[1] for t in targets] == ["encoder"] * 6 + ["decoder"] * 6
    assert {t.kind for t in targets} == {
        "layer.1.DenseReluDense.wi",
        "layer.1.DenseReluDense.wo",
        "layer.2.DenseReluDense.wi",
        "layer.2.DenseReluDense.wo",
    }


@pytest.mark.parametrize("architecture", ["qwen3", "gemma"])
def test_attention_wider_than_the_hidden_size_would_pass_for_an_mlp_by_shape(
    architecture: str,
) -> None:
    """q_proj (24, 16) and o_proj (16, 24) map to another width and back, as an MLP does."""
    model = classifier(architecture)
    attention = model.get_submodule("model.layers.0.self_attn")
    shapes = [tuple(getattr(attention, part).weight.shape) for part in ("q_proj", "o_proj")]
    assert shapes == [(24, 16), (16, 24)]
    assert not any("attn" in t.name for t in targets_of(model))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_weight_view_is_out_by_in_and_shares_memory(architecture: str) -> None:
    model = classifier(architecture)
    target = targets_of(model)[0]
    weight = target.weight_OI(model)
    assert weight.shape == UP
    with torch.no_grad():
        weight[3, 5] = 42.0
    stored = model.get_submodule(target.name).weight
    assert isinstance(stored, nn.Parameter)
    assert float(stored[(5, 3) if target.transposed else (3, 5)].detach()) == 42.0


def test_papers_choice_for_llama_up_and_down_of_every_third_block() -> None:
    model = classifier("llama", num_hidden_layers=7)
    targets = targets_of(model, modules=("*.up_proj", "*.down_proj"), blocks="::3")
    assert [t.name for t in targets] == [
        f"model.layers.{n}.mlp.{part}_proj" for n in (0, 3, 6) for part in ("up", "down")
    ]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("::2", [0, 2, 4]),
        ("1:3", [1, 2]),
        ("-2:", [3, 4]),
        ("::-1", [0, 1, 2, 3, 4]),
        (":99", [0, 1, 2, 3, 4]),
        ((0, 3), [0, 3]),
        ((3, 0, 3), [0, 3]),
        ((-1,), [4]),
        ((-5, 1), [0, 1]),
    ],
)
def test_blocks_by_slice_list_and_negative_numbers(
    blocks: str | tuple[int, ...], expected: list[int]
) -> None:
    targets = targets_of(classifier(num_hidden_layers=5), blocks=blocks)
    assert [t.block for t in targets] == [n for n in expected for _ in range(2)]


def test_negative_blocks_count_from_the_last_block_that_has_targets() -> None:
    model = classifier(num_hidden_layers=7)
    section = {"modules": ("*.layer.[036].output.dense",)}
    assert [t.block for t in targets_of(model, **section)] == [0, 3, 6]
    assert [t.block for t in targets_of(model, **section, blocks=(-1,))] == [6]
    assert [t.block for t in targets_of(model, **section, blocks="-1:")] == [6]


@pytest.mark.parametrize(
    ("blocks", "named"), [((7,), "7"), ((0, -4), "-4"), ((1, 3), "3"), ("5:", "none")]
)
def test_blocks_that_are_not_there_are_refused(blocks: str | tuple[int, ...], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets_of(classifier(), blocks=blocks)
    assert named in caught.value.what
    assert caught.value.where == "targets.blocks"
    assert "0 to 2" in str(caught.value.fix)


def test_patterns_may_name_any_linear_layer_of_the_blocks() -> None:
    model = classifier()
    targets = targets_of(model, modules=("*.query", "output.dense"))
    assert [t.kind for t in targets] == ["attention.self.query", "output.dense"] * BLOCKS
    assert targets_of(model, modules=("*.query", "attention.self.*"))[1].kind.endswith("key")


def test_a_pattern_matches_the_whole_path_and_is_case_sensitive() -> None:
    model = classifier("llama")
    assert len(targets_of(model, modules=("model.layers.1.*",))) == 7
    with pytest.raises(UsageError):
        targets_of(model, modules=("*.UP_PROJ",))
    with pytest.raises(UsageError):
        targets_of(model, modules=("up_proj",))  # the kind is mlp.up_proj


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("bert", ["intermediate.dense (40 x 16)", "attention.self.query (16 x 16)"]),
        ("gpt2", ["mlp.c_fc (40 x 16)", "mlp.c_proj (16 x 40)", "attn.c_attn (48 x 16)"]),
        ("llama", ["mlp.gate_proj (40 x 16)", "self_attn.k_proj (8 x 16)"]),
    ],
)
def test_a_pattern_that_matches_nothing_lists_what_there_is(
    architecture: str, kinds: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        targets_of(classifier(architecture), modules=("*.nonsense_xyz",))
    text = str(caught.value)
    assert "'*.nonsense_xyz'" in text
    assert all(kind in text for kind in kinds)
    assert caught.value.where == "targets.modules"
    assert caught.value.exit_code == 2


def test_a_pattern_that_is_nearly_right_gets_a_hint_and_the_list() -> None:
    with pytest.raises(UsageError) as caught:
        targets_of(classifier("llama"), modules=("*.mlp.upproj",))
    assert "did you mean mlp.up_proj?" in str(caught.value)
    assert "mlp.down_proj (16 x 40)" in str(caught.value)


def test_one_bad_pattern_among_good_ones_is_refused() -> None:
    with pytest.raises(UsageError, match="nonsense"):
        targets_of(classifier("llama"), modules=("*.up_proj", "*.nonsense"))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="no list of blocks"):
        find_targets(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), TargetsSection())


class Block(nn.Module):
    """A block of square layers only."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(4, 4)


def test_blocks_without_an_mlp_are_refused_with_what_there_is() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    with pytest.raises(UsageError) as caught:
        find_targets(model, TargetsSection())
    assert "no MLP was recognised" in caught.value.what
    assert "square (4 x 4)" in str(caught.value.fix)


def test_the_error_says_where_in_the_recipe() -> None:
    with pytest.raises(UsageError) as caught:
        find_targets(classifier(), TargetsSection(modules=("*.zzz",)), "my.yaml:3: targets")
    assert caught.value.where == "my.yaml:3: targets.modules"


@pytest.mark.parametrize("architecture", EXPECTED)
def test_only_the_outermost_list_of_blocks_counts(architecture: str) -> None:
    found = find_blocks(classifier(architecture))
    assert [(name, len(blocks)) for name, blocks in found] == [(EXPECTED[architecture][0], BLOCKS)]


def test_conv1d_is_read_as_the_layer_it_is() -> None:
    model = classifier("gpt2")
    target = targets_of(model)[1]
    layer = model.get_submodule(target.name)
    assert isinstance(layer, Conv1D)
    assert tuple(layer.weight.shape) == (INNER, HIDDEN), "stored as (in, out)"
    assert (target.out_features, target.in_features) == (HIDDEN, INNER)


def test_freeze() -> None:
    model = classifier()
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
