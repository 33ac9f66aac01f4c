"""Encoders that compute real tokens only, against the same models with padding."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from support.tiny_models import (
    ARCHITECTURES,
    INNER,
    METHODS,
    VOCABULARY,
    classifier,
    run_data,
    targets_of,
)
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.token_rows import rows_of
from sparsegrad_cli.models.unpadding import use_unpadding
from sparsegrad_cli.recipe.schema import TrainSection

LENGTHS = [9, 3, 6, 6, 1, 5]
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {},
    "distilbert": {},
    "mpnet": {"pad_token_id": 1},
}
# Copies of RoBERTa under other names: they are recognized by structure.
KIN = ("camembert", "xlm-roberta", "data2vec-text")


def model_of(name: str, **settings: Any) -> nn.Module:
    """A tiny classifier without dropout, whose parts all have an effect."""
    off = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    settings = dict.fromkeys((*off, "seq_classif_dropout"), 0.0) | FAMILIES[name] | settings
    model = classifier(name, **settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def batch(
    padding: int = 0, *, left: bool = False, lengths: list[int] = LENGTHS
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    width = max(lengths) + 2
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    columns = torch.arange(width)
    starts = torch.tensor([width - n if left else 0 for n in lengths])[:, None]
    mask = (columns >= starts) & (columns < starts + torch.tensor(lengths)[:, None])
    labels = torch.arange(len(lengths)) % 2
    inputs = {"input_ids": ids.masked_fill(~mask, padding), "attention_mask": mask.long()}
    return {**inputs, "labels": labels}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # LoRA-GGPO draws noise.
    output = model(**inputs)
    output.loss.backward()
    return output, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(
    model: nn.Module, unpadding: Any, inputs: dict[str, Tensor], at: float = 1e-5
) -> None:
    """Compare loss, logits and the gradient of every parameter with those of the padded model."""
    with unpadding.turned_off():
        expected, theirs = step(model, inputs)
    found, ours = step(model, inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=at, atol=at)
    torch.testing.assert_close(found.loss, expected.loss, rtol=at, atol=at)
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        difference = float((ours[name] - gradient).abs().max())
        assert difference <= at * largest, name


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_logits_and_every_gradient_are_those_of_the_padded_model(name: str) -> None:
    model = model_of(name).train()
    unpadding = use_unpadding(model)
    inputs = batch(FAMILIES[name].get("pad_token_id", 0))
    assert_same(model, unpadding, inputs)
    if name in ("bert", "electra"):  # With two kinds of tokens.
        assert_same(model, unpadding, {**inputs, "token_type_ids": inputs["input_ids"] % 2})


@pytest.mark.parametrize("name", KIN)
def test_kin_of_roberta_are_recognized_by_their_structure(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, name, (name, ARCHITECTURES["roberta"][1]))
    monkeypatch.setitem(FAMILIES, name, FAMILIES["roberta"])
    model = model_of(name).train()
    assert_same(model, use_unpadding(model), batch(1))


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_the_comparison_notices_positions_that_are_shifted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name).train()
    unpadding = use_unpadding(model)
    from sparsegrad_cli.models import unpadding as module

    right = module._positions
    monkeypatch.setattr(module, "_positions", lambda *given: right(*given) + 1)
    with pytest.raises(AssertionError):
        assert_same(model, unpadding, batch(FAMILIES[name].get("pad_token_id", 0)), at=1e-3)


def test_tokens_are_counted_and_the_last_block_computes_the_first_of_each_row() -> None:
    model = model_of("bert").train()
    unpadding = use_unpadding(model)
    inputs = batch()
    computed: list[int] = []
    for block in unpadding.blocks:
        block.output.register_forward_pre_hook(lambda *_: pytest.fail("the padded block ran"))
        block.intermediate.dense.register_forward_hook(
            lambda layer, args, out: computed.append(out.shape[:-1].numel())
        )
    step(model, inputs)
    real, rows = sum(LENGTHS), len(LENGTHS)
    assert computed == [real, real, rows]
    counts = unpadding.training
    assert counts.real == real and counts.padded == rows * 11
    assert counts.computed == 2 * real + rows
    assert (counts.batches, counts.padded_batches) == (1, 0)
    assert unpadding.evaluation.batches == 0


def test_padding_on_the_left_is_left_to_a_head_that_reads_the_first_column() -> None:
    model = model_of("bert").train()
    unpadding = use_unpadding(model)
    assert_same(model, unpadding, batch(left=True), at=0)
    assert unpadding.training.padded_batches == 2


def test_an_encoder_alone_gives_the_states_of_all_its_tokens() -> None:
    encoder = model_of("roberta").get_submodule("roberta")
    unpadding = use_unpadding(encoder)
    assert not unpadding.first_only
    for left in (False, True):
        inputs = {k: v for k, v in batch(1, left=left).items() if k != "labels"}
        with unpadding.turned_off():
            expected = encoder(**inputs).last_hidden_state
        found = encoder(**inputs).last_hidden_state
        there = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)
        assert not found[~there].any()
    assert unpadding.evaluation.padded_batches == 2  # Those that were turned off.


class _MeanHead(nn.Module):
    """A classifier that pools all tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.classifier = model.bert, model.classifier
        self.bert.pooler = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        share = attention_mask / attention_mask.sum(1, keepdim=True)
        logits = self.classifier((states * share[..., None]).sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("left", [False, True])
def test_a_head_that_pools_all_tokens_gets_them(left: bool) -> None:
    model = _MeanHead(model_of("bert")).train()
    unpadding = use_unpadding(model)
    assert not unpadding.first_only
    assert_same(model, unpadding, batch(left=left))
    assert unpadding.training.padded_batches == 1  # The one that was turned off.


@pytest.mark.parametrize(
    "change",
    [
        {"position_ids": torch.arange(11).expand(6, 11)},
        {"output_hidden_states": True},
        {"output_attentions": True},
    ],
)
def test_a_batch_that_asks_for_more_is_computed_with_padding(change: dict[str, Any]) -> None:
    model = model_of("bert", attn_implementation="eager")
    unpadding = use_unpadding(model)
    inputs = batch() | change
    with unpadding.turned_off():
        expected = model(**inputs)
    found = model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert (found.hidden_states is None) == ("output_hidden_states" not in change)
    assert unpadding.evaluation.padded_batches == 2


def test_an_encoder_takes_its_arguments_by_place_and_its_configuration_asks_for_more() -> None:
    encoder: Any = model_of("bert", attn_implementation="eager").get_submodule("bert")
    unpadding = use_unpadding(encoder)
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    types = ids % 2
    by_name = encoder(ids, attention_mask=mask, token_type_ids=types).pooler_output
    by_place = encoder(ids, mask, types).pooler_output
    torch.testing.assert_close(by_place, by_name, rtol=1e-5, atol=1e-5)
    assert unpadding.evaluation.padded_batches == 1
    encoder.config.output_hidden_states = True
    assert len(encoder(ids, attention_mask=mask).hidden_states) == 4


def test_rows_with_holes_and_empty_rows_have_no_place() -> None:
    assert rows_of(torch.ones(0, 3)) is None
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert rows_of(mask) is None
    assert rows_of(torch.tensor([[1, 1, 0], [0, 0, 0]])) is None
    rows = rows_of(torch.tensor([[0, 1, 0], [1, 1, 1]]))
    assert rows is not None
    assert rows.places.tolist() == [3, 4, 5, 1]
    assert rows.starts.tolist() == [0, 3] and rows.ranks.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["deberta-v3", "gpt2", "llama"])
def test_another_architecture_is_refused_in_a_sentence_and_left_alone(name: str) -> None:
    model = classifier(name)
    before = model(**batch())
    with pytest.raises(UsageError, match="computed with their padding"):
        use_unpadding(model)
    assert torch.equal(model(**batch()).logits, before.logits)


def test_a_model_that_needs_more_than_its_structure_says_is_left_as_it_was() -> None:
    model = model_of("bert")
    # The norm before attention: the names of BERT, another function.
    encoder: Any = model.get_submodule("bert.encoder")
    for block in encoder.layer:
        plain = block.attention.forward
        block.attention.forward = lambda x, *a, plain=plain, **k: plain(x * 2, *a, **k)
    forwards = [vars(module).get("forward") for module in model.modules()]
    with pytest.raises(UsageError, match="BertModel cannot be computed without padding"):
        use_unpadding(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards


def test_it_is_installed_once_and_copies_are_independent() -> None:
    model = model_of("bert")
    unpadding = use_unpadding(model)
    assert use_unpadding(model) is unpadding
    names = set(model.state_dict())
    other = copy.deepcopy(model)
    assert set(other.state_dict()) == names
    mine: Any = other.get_submodule("bert.encoder.layer.0.output.dense")
    with torch.no_grad():
        mine.weight.zero_()
    inputs = batch()
    with use_unpadding(other).turned_off():
        expected = other(**inputs).logits
    torch.testing.assert_close(other(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert use_unpadding(other) is not unpadding
    assert not torch.allclose(model(**inputs).logits, expected)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = model_of("bert").train()
    unpadding = use_unpadding(model)
    runs: list[int] = []
    unpadding.blocks[1].intermediate.dense.register_forward_hook(lambda *_: runs.append(1))
    _, expected = step(model, batch())
    assert len(runs) == 1
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    _, found = step(model, batch())
    assert len(runs) == 3  # Once more in the backward pass.
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert unpadding.training.padded_batches == 0


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_wide_activations_are_recomputed_where_the_recipe_asks_for_it(name: str) -> None:
    kept, passes = [], []
    for recompute in ("none", "activation"):
        model = model_of(name).train()
        targets = targets_of(model)
        save_memory(model, targets, recompute)
        unpadding = use_unpadding(model)
        runs: list[int] = []
        up = model.get_submodule(targets[0].name)
        up.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape[-1:] == (INNER,) else 0)
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**batch())
        kept.append(sum(sizes))
        output.loss.backward()
        passes.append(len(runs))
        assert_same(model, unpadding, batch())
    assert kept[1] < kept[0] and passes == [1, 2]


def test_a_recomputed_block_keeps_nothing_wide() -> None:
    model = model_of("bert").train()
    use_unpadding(model)
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    wide: list[weakref.ref[Tensor]] = []
    encoder: Any = model.get_submodule("bert.encoder")
    for block in encoder.layer:
        block.intermediate.dense.register_forward_hook(
            lambda layer, args, out: wide.append(weakref.ref(out))
        )
    output = model(**batch())
    assert len(wide) == 3 and [known() for known in wide] == [None] * 3
    output.loss.backward()


def test_dropout_is_the_same_when_blocks_are_recomputed() -> None:
    model = model_of("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
    use_unpadding(model)
    _, expected = step(model, batch())
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    _, found = step(model, batch())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def test_autocast_gives_what_it_gives_with_padding() -> None:
    model = model_of("bert").train()
    unpadding = use_unpadding(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, unpadding, batch(), at=0.05)
    # The comparison with float32 shows that products were made in bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = step(model, batch())
    whole, _ = step(model, batch())
    assert not torch.allclose(half.logits.float(), whole.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradients_of_the_padded_model(method: str) -> None:
    from support.tiny_models import calibrated

    settings, basis_per = METHODS[method]
    model = model_of("bert").train()
    targets = targets_of(model)
    save_memory(model, targets)
    bases = None
    if basis_per is not None:
        bases = calibrated(model, targets, steps=2, basis_per=basis_per, warmup_steps=0).by_target()
    unpadding = use_unpadding(model)
    torch.manual_seed(0)
    implementation = settings.implementation()
    implementation.prepare(model, targets, scope="head", bases=bases, training=run_data(model, 5))
    implementation.optimizer(model, TrainSection())  # Some supports need it from the first step on.
    with torch.no_grad():  # An adapter that starts at zero would hide most gradients.
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    assert_same(model, unpadding, batch(), at=2e-5)


@pytest.mark.parametrize("first", ["unpadding", "adapter"])
def test_a_model_of_peft_has_the_gradients_of_the_padded_one(first: str) -> None:
    """LoRA on every linear layer of a block, also those of attention."""
    import peft

    model = model_of("bert")
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", lora_alpha=8)
    config.init_lora_weights = False
    if first == "unpadding":
        use_unpadding(model)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config).train()
    unpadding = use_unpadding(wrapped)
    assert_same(wrapped, unpadding, batch())
    with wrapped.disable_adapter():
        plain = wrapped(**batch()).logits
    adapted = wrapped(**batch()).logits
    assert not torch.allclose(plain, adapted, atol=1e-3)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(**batch()).logits, adapted, rtol=1e-4, atol=1e-4)
    assert unpadding.training.padded_batches == 1  # The one that was turned off.


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_encoder_gives_what_it_gives_with_padding(bits: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = model_of("bert")
    encoder: Any = model.get_submodule("bert.encoder")
    for block in encoder.layer:
        for owner in (block.intermediate, block.output, block.attention.output):
            owner.dense = quantized(bitsandbytes, owner.dense, bits)
    model.train()
    inputs = batch()
    unpadding = use_unpadding(model)
    assert_same(model, unpadding, inputs, at=1e-4 if bits == 4 else 0.05)
    assert unpadding.training.padded_batches == 1


def quantized(bitsandbytes: Any, layer: nn.Linear, bits: int) -> nn.Module:
    sizes = (layer.in_features, layer.out_features)
    if bits == 4:
        packed = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32)
        packed.weight = bitsandbytes.nn.Params4bit(layer.weight.detach(), requires_grad=False)
    else:
        packed = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        packed.weight = bitsandbytes.nn.Int8Params(
            layer.weight.detach(), requires_grad=False, has_fp16_weights=False
        )
    packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    moved: nn.Module = packed.to("cpu")
    return moved
