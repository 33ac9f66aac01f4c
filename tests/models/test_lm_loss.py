"""The loss of labelled tokens alone is the loss of the whole logits, for less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, build, config
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.lm_head import LmHead, find_lm_head
from sparsegrad_cli.models.lm_loss import LmSums, lm_loss, lm_sums, use_lm_loss
from sparsegrad_cli.models.sampled_loss import SampledLoss

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
# Models that do something to their logits -> what their configuration calls it.
CHANGED: dict[str, tuple[dict[str, Any], LmHead]] = {
    "gemma2": ({"final_logit_softcapping": 0.05}, LmHead(cap=0.05)),
    "cohere": ({"logit_scale": 0.25}, LmHead(scale=0.25)),
    "granite": ({"logits_scaling": 4.0}, LmHead(scale=0.25)),
}


def causal(
    architecture: str, dtype: torch.dtype = torch.float64, frozen: bool = False, **overrides: Any
) -> Any:
    """A tiny random causal language model; frozen: all but the MLPs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture in CHANGED:
        settings = AutoConfig.for_model(architecture, **SMALL, **CHANGED[architecture][0])
    else:
        settings = config(architecture, **overrides)
    model = build(AutoModelForCausalLM, settings).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "mlp" in name or "fc" in name)
    return model


def batch(
    size: int = 4, length: int = 9, seed: int = 0, vocabulary: int = VOCABULARY
) -> dict[str, Tensor]:
    """Padded rows, about half of whose tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (size, length), generator=generator)
    lengths = torch.randint(4, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    drawn = torch.rand(size, length, generator=generator) < 0.5
    drawn[:, 3] = True
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(length).expand(size, -1),
        "labels": torch.where(drawn & mask.bool(), ids, -100),
    }


def count(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def whole_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """By the model's own logits of every position, summed."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest).logits[:, :-1].reshape(-1, model.config.vocab_size)  # type: ignore[union-attr]
    return F.cross_entropy(logits, inputs["labels"][:, 1:].reshape(-1), reduction="sum")


def gradients(model: nn.Module, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected) and found
    for name, gradient in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=tolerance * max(scale, 1e-3), msg=name
        )


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("architecture", [*FAMILIES, *CHANGED])
def test_value_and_gradients_are_those_of_the_whole_logits(
    architecture: str, dtype: torch.dtype, tolerance: float, frozen: bool
) -> None:
    model = causal(architecture, dtype, frozen).train(False)
    inputs = batch()
    expected = whole_loss(model, inputs)
    found = lm_loss(model, inputs, 7.0)
    torch.testing.assert_close(found * 7, expected, rtol=tolerance, atol=0)
    same(gradients(model, found * 7), gradients(model, expected), tolerance)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_trains_gets_its_gradient_tied_or_not(tied: bool) -> None:
    model = causal("llama", tie_word_embeddings=tied)
    inputs = batch()
    found, expected = (
        gradients(model, loss(model, inputs))
        for loss in (lambda m, i: lm_loss(m, i, 1.0), whole_loss)
    )
    assert ("lm_head.weight" in found) == (not tied)
    same(found, expected, 1e-11)


def test_the_model_itself_agrees() -> None:
    model, inputs = causal("llama"), batch()
    # transformers takes the logits to float32 first.
    own = model(**inputs).loss.item()
    assert lm_loss(model, inputs, count(inputs)).item() == pytest.approx(own, rel=1e-6)


# --- how logits are made


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_most_models_have_a_plain_head(architecture: str, dtype: torch.dtype) -> None:
    assert find_lm_head(causal(architecture, dtype)) == LmHead()


@pytest.mark.parametrize("architecture", CHANGED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_caps_and_scales_are_found(architecture: str, dtype: torch.dtype) -> None:
    assert find_lm_head(causal(architecture, dtype)) == CHANGED[architecture][1]


def own_loss_of(change: Any) -> tuple[Any, LmHead]:
    """A LLaMA whose class was changed, and what is found of its head."""
    from transformers import LlamaForCausalLM

    class Changed(LlamaForCausalLM):
        pass

    change(Changed)
    model = build(Changed, config("llama")).double()
    return model, find_lm_head(model)


def cap_unsaid(kind: Any) -> None:
    plain = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = 15 * torch.tanh(out.logits / 15)
        return out

    kind.forward = forward


def scale_states(kind: Any) -> None:
    def forward(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states / 3))

    kind.forward = forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [(cap_unsaid, "in an unknown way"), (scale_states, "does not read")],
)
def test_an_unknown_head_is_left_to_the_model(change: Any, reason: str) -> None:
    model, head = own_loss_of(change)
    assert head.reason is not None and reason in head.reason
    inputs = batch()
    torch.testing.assert_close(lm_loss(model, inputs, 1.0, head=head), whole_loss(model, inputs))
    same(
        gradients(model, lm_loss(model, inputs, 1.0, head=head)),
        gradients(model, whole_loss(model, inputs)),
        1e-11,
    )
    sums = lm_sums(model, inputs, head=head)
    assert sums.loss == pytest.approx(whole_loss(model, inputs).item())
    assert sums.tokens == count(inputs)


def test_a_model_that_looks_ahead_is_refused() -> None:
    from transformers import BertLMHeadModel

    with pytest.raises(UsageError, match="BertLMHeadModel lets a position see later ones"):
        find_lm_head(build(BertLMHeadModel, config("bert")))
    causal_bert = build(BertLMHeadModel, config("bert", is_decoder=True))
    assert find_lm_head(causal_bert).reason is not None


def test_trying_leaves_the_model_as_it_was() -> None:
    model = causal("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    find_lm_head(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


# --- memory


def test_the_peak_is_far_below_that_of_the_logits() -> None:
    """128 tokens, 16 labelled, vocabulary 16,384: logits of all of them are 8 MiB, of 16 1 MiB."""
    inputs = batch(4, 32, vocabulary=16_384)
    inputs["labels"][:, :28] = -100
    inputs["labels"][:, 28:] = inputs["input_ids"][:, 28:]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = 4 * 32 * 16_384 * 4
    peaks = {}
    for name, loss in (
        ("whole", whole_loss),
        ("labelled", lambda m, i: lm_loss(m, i, 1.0, head=LmHead())),
    ):
        model = causal("llama", torch.float32, frozen=True, vocab_size=16_384).train()
        meter = MemoryMeter()
        meter.watch(model)
        with meter.phase("backward"):
            loss(model, inputs).backward()
        peak = meter.peak("backward")
        assert peak is not None
        peaks[name] = peak.peak_bytes - peak.categories["weights"]
        # The frozen head got no gradient: what did is smaller than one row of it is long.
        assert peak.categories["gradients"] < model.lm_head.weight.nbytes / 16
    assert peaks["whole"] > 2 * logits
    assert peaks["labelled"] < logits / 4


def test_evaluation_holds_a_block_of_logits() -> None:
    model = causal("llama", torch.float32, vocab_size=262_144)
    inputs = batch(6, 32, vocabulary=262_144)
    meter = MemoryMeter()
    meter.watch(model)
    with meter.phase("evaluate"):
        sums = lm_sums(model, inputs, head=LmHead())
    peak = meter.peak("evaluate")
    assert peak is not None and sums.tokens > 32
    block = 16 * 262_144 * 4
    assert (
        peak.peak_bytes - peak.categories["weights"] < 1.1 * block < sums.tokens * 262_144 * 4 / 2
    )


# --- training


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, inputs = causal("llama", frozen=True).train(), batch()
    expected = gradients(model, lm_loss(model, inputs, 3.0))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    same(gradients(model, lm_loss(model, inputs, 3.0)), expected, 1e-11)


def test_micro_batches_weigh_every_token_the_same() -> None:
    """1 x 8, 8 x 1 and 2 x 4 rows, of different lengths: the same gradients."""
    model, inputs = causal("llama"), batch(8)
    tokens = count(inputs)
    found = []
    for size in (8, 1, 4):
        parts = [
            {name: value[start : start + size] for name, value in inputs.items()}
            for start in range(0, 8, size)
        ]
        losses = [lm_loss(model, part, tokens) for part in parts]
        found.append((sum(loss.item() for loss in losses), gradients(model, *losses)))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0])
        same(grads, found[0][1], 1e-11)


def test_autocast_computes_as_the_model_does() -> None:
    model, inputs = causal("llama", torch.float32), batch()
    exact = whole_loss(model, inputs).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm_loss(model, inputs, 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-2)
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


def test_a_bfloat16_model_sums_in_float32() -> None:
    model, inputs = causal("llama", torch.bfloat16), batch(16)
    loss = lm_loss(model, inputs, 1.0)
    assert loss.dtype == torch.float32
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest).logits[:, :-1].double().reshape(-1, VOCABULARY)
    exact = F.cross_entropy(logits, inputs["labels"][:, 1:].reshape(-1), reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_positions_and_mask_reach_the_decoder() -> None:
    model, inputs = causal("gpt2"), batch()
    plain = lm_loss(model, inputs, 1.0).item()
    shifted = {**inputs, "position_ids": inputs["position_ids"] + 5}
    assert lm_loss(model, shifted, 1.0).item() != pytest.approx(plain, rel=1e-6)
    hidden = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    hidden["attention_mask"][:, 0] = 0
    assert lm_loss(model, hidden, 1.0).item() != pytest.approx(plain, rel=1e-6)


def test_a_batch_without_labels_is_refused() -> None:
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, 0] = 5  # has nothing before it
    for compute in (lambda m: lm_loss(m, inputs, 1.0), lambda m: lm_sums(m, inputs)):
        with pytest.raises(DataError, match="no token of this batch of 4 rows is labelled"):
            compute(causal("llama"))


# --- evaluation


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_sums_by_hand_and_added_up(architecture: str) -> None:
    model, first, second = causal(architecture), batch(seed=1), batch(3, seed=2)
    total = LmSums()
    loss, correct, tokens = 0.0, 0, 0
    for inputs in (first, second):
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        logits, labels = model(**rest).logits[:, :-1], inputs["labels"][:, 1:]
        # The first label is made the likeliest token, so that some are right.
        places = (labels != -100).nonzero()
        row, column = places[0]
        labels[row, column] = logits[row, column].argmax()
        for r, c in places:
            loss -= logits[r, c].log_softmax(0)[labels[r, c]].item()
            correct += int(logits[r, c].argmax() == labels[r, c])
            tokens += 1
        found = lm_sums(model, inputs)
        total = total + found
    assert total.loss == pytest.approx(loss)
    assert (total.tokens, total.correct) == (tokens, correct)
    assert correct >= 2


# --- in the model's own forward


def test_the_models_own_forward_can_compute_it() -> None:
    model, inputs = causal("llama"), batch()
    before = whole_loss(model, inputs)
    names = set(model.state_dict())
    assert use_lm_loss(model) == LmHead()
    out = model(**inputs, num_items_in_batch=torch.tensor(5))
    assert out.logits is None
    torch.testing.assert_close(out.loss * 5, before)
    torch.testing.assert_close(model(**inputs).loss * count(inputs), before)
    ids = inputs["input_ids"]
    torch.testing.assert_close(
        model(ids, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss,
        model(**inputs).loss,
    )
    assert model(ids).logits.shape == (4, 9, VOCABULARY)
    assert set(model.state_dict()) == names
    assert lm_sums(model, inputs).loss == pytest.approx(before.item())


def test_transformers_trainer_weighs_tokens_with_it(tmp_path: Any) -> None:
    """Two accumulation steps of unequal tokens give the gradients of the whole batch."""
    from transformers import Trainer, TrainingArguments

    inputs = batch(4)
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(4)]
    reference = causal("llama", torch.float32)
    expected = gradients(reference, lm_loss(reference, inputs, count(inputs)))
    model = causal("llama", torch.float32)
    use_lm_loss(model)
    seen: dict[str, Tensor] = {}

    class Watched(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer()
            step = optimizer.step

            def watched(*args: Any, **kwargs: Any) -> Any:
                seen.update({n: p.grad.clone() for n, p in self.model.named_parameters()})
                return step(*args, **kwargs)

            optimizer.step = watched
            return optimizer

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    collate = lambda chosen: {n: torch.stack([row[n] for row in chosen]) for n in chosen[0]}
    Watched(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    same(seen, expected, 1e-4)


# --- over a sample of the vocabulary

SAMPLED = {
    "sce": SampledLoss("sce", 42, {"buckets": 3, "positions": 6, "classes": 5}),
    "rece": SampledLoss("rece", 42, {"chunks": 6, "neighbours": 1, "rounds": 2}),
}
EVERYTHING = {
    "sce": SampledLoss("sce", 42, {"buckets": 2, "positions": 99, "classes": VOCABULARY}),
    "rece": SampledLoss("rece", 42, {"chunks": 3, "neighbours": 2, "rounds": 2}),
}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_sample_of_everything_is_the_whole_loss(architecture: str, name: str) -> None:
    model, inputs = causal(architecture), batch()
    expected = whole_loss(model, inputs)
    whole = gradients(model, expected / count(inputs))
    use_lm_loss(model, EVERYTHING[name])
    loss = model(**inputs, loss_draw=(1, 1)).loss
    torch.testing.assert_close(loss * count(inputs), expected)
    same(gradients(model, loss), whole, 1e-10)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_loss_follows_its_draw_and_is_for_training_steps_alone(name: str) -> None:
    model, inputs = causal("llama"), batch()
    expected = whole_loss(model, inputs)
    use_lm_loss(model, SAMPLED[name])
    torch.testing.assert_close(model(**inputs).loss * count(inputs), expected)
    assert lm_sums(model, inputs).loss == pytest.approx(expected.item())
    draws = [(1, 1), (1, 1), (2, 1), (1, 2)]
    first, again, *others = [model(**inputs, loss_draw=draw).loss.item() for draw in draws]
    assert first == again
    assert len({first, *others, expected.item() / count(inputs)}) == 4


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", SAMPLED)
def test_tied_embeddings_get_a_gradient_from_a_sampled_loss_only_if_they_train(
    name: str, frozen: bool
) -> None:
    model, inputs = causal("llama", frozen=frozen, tie_word_embeddings=True), batch()
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    whole = gradients(model, whole_loss(model, inputs))
    model.zero_grad()
    use_lm_loss(model, EVERYTHING[name])
    model(**inputs, num_items_in_batch=1, loss_draw=(1, 1)).loss.backward()
    assert (head.grad is None) == frozen
    same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, whole, 1e-10)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_loss_under_autocast(name: str) -> None:
    """The hidden states are close to those in float32, so few of the sets change."""
    model, inputs = causal("llama", torch.float32), batch()
    use_lm_loss(model, EVERYTHING[name])
    expected = model(**inputs, loss_draw=(1, 1)).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, loss_draw=(1, 1)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_a_sampled_loss_needs_a_linear_head() -> None:
    model, _ = own_loss_of(cap_unsaid)
    with pytest.raises(UsageError, match="computes all logits: it changes its head") as found:
        use_lm_loss(model, SAMPLED["sce"])
    assert found.value.where == "train.loss"
