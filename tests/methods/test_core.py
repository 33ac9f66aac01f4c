"""The core form as a method: supports, allocation, and exact bytes against LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from support.cli_runs import Cli
from support.tiny_models import (
    INNER,
    batch,
    calibrated,
    classifier,
    one_thread,
    orthogonal_bases,
    targets_of,
)
from torch import Tensor, nn

from benchmarks.memory import step_bytes
from benchmarks.models import methods_at
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.implementation import trainable_state
from sparsegrad_cli.methods.sparsegrad.core import SparsegradCore
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.targets import basis_keys
from sparsegrad_cli.numerics.hosvd import truncated
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.numerics.supports import largest_entries, spectral_scores
from sparsegrad_cli.peft import SparseGradLayer
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.recipe.section import parse_bytes
from sparsegrad_cli.training.checkpoint import load_weights

RANK = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def settings(**more: Any) -> SparsegradSettings:
    plain = {"name": "sparsegrad", "form": "core", "support": "static", "rank": RANK}
    return SparsegradSettings.model_validate({**plain, "density": 0.03, **more})


def prepared(
    bases: Any, scores: Any = None, scope: str = "head", **more: Any
) -> tuple[nn.Module, dict[str, SparseGradLayer], SparsegradCore]:
    model = classifier()
    targets = targets_of(model)
    method = SparsegradCore(settings(**more))
    save_memory(model, targets, method.settings.recompute)
    method.prepare(model, targets, scope=scope, bases=bases, scores=scores)
    layers = {t.name: model.get_submodule(t.name) for t in targets}
    assert all(isinstance(layer, SparseGradLayer) for layer in layers.values())
    return model, layers, method  # type: ignore[return-value]


def positive(targets: Any, rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {t.name: torch.rand(rank, rank, generator=generator) * (1 + t.block) for t in targets}


def test_without_scores_the_spectra_choose() -> None:
    model = classifier()
    bases = calibrated(model, targets_of(model), source="token", steps=2).by_target()
    _, layers, _ = prepared(bases)
    for target in targets_of(model):
        expected = largest_entries(
            spectral_scores(truncated(bases[target.name], RANK)),
            count_for_density(0.03, target.out_features, target.in_features),
        )
        assert torch.equal(layers[target.name].sparsegrad_support["default"].long(), expected)


@pytest.mark.parametrize("rank", [RANK, 12])
def test_scores_choose_and_are_cut_to_the_rank(rank: int) -> None:
    targets = targets_of(classifier())
    scores = positive(targets, rank)
    _, layers, _ = prepared(orthogonal_bases(targets, torch.float32), scores)
    for target in targets:
        count = count_for_density(0.03, target.out_features, target.in_features)
        expected = largest_entries(scores[target.name][:RANK, :RANK], count)
        assert torch.equal(layers[target.name].sparsegrad_support["default"].long(), expected)


@pytest.mark.parametrize("support", ["static", "dense", "dynamic"])
def test_bases_in_the_dtype_of_autocast_give_the_same_steps(support: str) -> None:
    """Bit for bit, in half the bytes; the values stay in float32."""
    targets, found = targets_of(classifier()), []
    shared = dict.fromkeys(
        (t.name for t in targets if t.kind == targets[0].kind),
        orthogonal_bases(targets, torch.float32)[targets[0].name],
    )
    bases = orthogonal_bases(targets, torch.float32) | shared
    for autocast in (None, torch.bfloat16):
        model, method = classifier(), SparsegradCore(settings(support=support))
        held = method.prepare(model, targets, scope="head", bases=bases, autocast=autocast).bases
        assert {q.dtype for q in held} == {autocast or torch.float32}
        optimizer = method.optimizer(model, TrainSection(learning_rate=0.1))
        for seed in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((sum(q.nbytes for q in held), loss, trainable_state(model)))
    (wide, loss, state), (narrow, same_loss, same_state) = found
    assert wide == 2 * narrow and torch.equal(loss, same_loss)
    assert all(torch.equal(same_state[name], value) for name, value in state.items())
    assert any(value.abs().sum() > 0 for name, value in state.items() if "values" in name)


@pytest.mark.parametrize("per", ["layer", "kind"])
@pytest.mark.parametrize("budget", ["20KiB", "33.5KiB", "1MiB"])
def test_a_rank_in_bytes_is_the_largest_that_fits(per: str, budget: str) -> None:
    targets = targets_of(classifier())
    shapes, keys = TargetShapes(targets, per), basis_keys(targets, per)

    def taken(rank: int) -> int:
        """Counted on a prepared model: bases once each, and four numbers an entry of a core."""
        bases = orthogonal_bases(targets, torch.float32)
        first: dict[str, Any] = {}
        shared = {t.name: first.setdefault(keys[t.name], bases[t.name]) for t in targets}
        method = SparsegradCore(settings(rank=rank, support="dense"))
        found = method.prepare(classifier(), targets, scope="head", bases=shared)
        return 4 * sum(q.numel() for q in found.bases) + 16 * found.counts.trainable_targets

    rank = settings(rank=budget).settle(shapes).rank
    assert isinstance(rank, int)
    assert taken(rank) <= parse_bytes(budget)
    assert rank == INNER or taken(rank + 1) > parse_bytes(budget)


def test_a_rank_that_does_not_fit_is_refused() -> None:
    targets = targets_of(classifier())
    with pytest.raises(UsageError, match="rank 1 take more than 1KiB"):
        settings(rank="1KiB").settle(TargetShapes(targets))


@pytest.mark.parametrize(
    ("support", "density", "rank"),
    # 40 x 16 = 640 entries: 1 % are 6, a third of 18 <= 8 x 8; 30 % are 192, a third of 24 x 24
    [("static", 0.01, 8), ("static", 0.3, 24), ("dense", 0.3, 16), ("dynamic", 1.0, 40)],
)
def test_a_rank_that_is_left_open_follows_the_density(
    support: str, density: float, rank: int
) -> None:
    targets = targets_of(classifier())
    asked = settings(support=support, density=density, rank=None)
    assert asked.settle(TargetShapes(targets)).rank == rank


def test_other_forms_and_shares_keep_their_rank() -> None:
    shapes = TargetShapes(targets_of(classifier()))
    share = settings(rank=0.9)
    assert share.settle(shapes) is share
    paper = SparsegradSettings(name="sparsegrad", form="rotated")
    assert paper.settle(shapes) is paper
    assert (paper.support, settings(rank=4).support) == ("dynamic", "static")
    assert SparsegradSettings(name="sparsegrad", form="core").support == "static"


def test_allocation_over_the_model_gives_more_to_those_who_matter() -> None:
    targets = targets_of(classifier())
    scores = positive(targets)  # later blocks have larger scores
    bases = orthogonal_bases(targets, torch.float32)
    _, alone, _ = prepared(bases, scores)
    _, together, _ = prepared(bases, scores, allocation="model")
    sizes = [layer.sparsegrad_values["default"].numel() for layer in together.values()]
    assert sum(sizes) == sum(layer.sparsegrad_values["default"].numel() for layer in alone.values())
    assert sizes[0] < sizes[-1]
    assert min(sizes) >= 1
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    threshold = flat.sort(descending=True).values[sum(sizes) - 1]
    for name, layer in together.items():
        chosen = scores[name].reshape(-1)[layer.sparsegrad_support["default"].long()]
        assert bool((chosen >= threshold).all()) or len(chosen) == 1


def test_recomputing_changes_no_gradient() -> None:
    bases = orthogonal_bases(targets_of(classifier()), torch.float32)
    found = []
    for recompute in ("none", "activation"):
        model, _, _ = prepared(bases, recompute=recompute)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        model.train()
        torch.manual_seed(0)
        model(**batch()).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_nothing_below_the_first_adapted_layer_gets_a_gradient() -> None:
    """Its input wants none, so that neither dL/dx there nor any attention below is computed."""
    model = classifier()
    targets = targets_of(model)
    bases = orthogonal_bases(targets, torch.float32)
    SparsegradCore(settings()).prepare(model, targets, scope="head", bases=bases)
    first = model.get_submodule(targets[0].name)
    wanted: list[bool] = []
    first.register_forward_pre_hook(lambda _, args: wanted.append(args[0].requires_grad))
    loss = model(**batch()).loss
    names: set[str] = set()
    queue = [loss.grad_fn]
    while queue:
        node = queue.pop()
        names.add(f"{node.name()}@{id(node)}")
        queue += [n for n, _ in node.next_functions if n and f"{n.name()}@{id(n)}" not in names]
    assert wanted == [False]
    softmaxes = [n for n in names if "Softmax" in n or "ScaledDot" in n]
    # One a block above the first, and the loss.
    assert len([n for n in softmaxes if "LogSoftmax" not in n]) == len(targets) // 2 - 1


@pytest.mark.parametrize("support", ["static", "dynamic", "dense"])
def test_beside_half_precision_weights_the_core_trains_in_float32(support: str) -> None:
    model = classifier(dtype=torch.bfloat16)
    targets = targets_of(model)
    method = SparsegradCore(settings(support=support))
    bases = orthogonal_bases(targets, torch.float32)
    method.prepare(model, targets, scope="head", bases=bases)
    layer: Any = model.get_submodule(targets[0].name)
    assert type(layer) is SparseGradLayer
    weight: Any = layer.weight
    assert layer.sparsegrad_values["default"].dtype == torch.float32
    assert layer.sparsegrad_q_in["default"].dtype == weight.dtype == torch.bfloat16
    frozen = weight.detach().clone()
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-5))  # lost in bfloat16
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    moved = layer.sparsegrad_values["default"].detach().abs()
    assert 0 < float(moved.max()) < 1e-4
    assert torch.equal(weight, frozen)
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} & {torch.float32}


def test_a_refreshed_support_holds_and_then_follows_the_mean_gradient() -> None:
    targets = targets_of(classifier())
    scores = positive(targets)
    model, layers, method = prepared(
        orthogonal_bases(targets, torch.float32), scores, support="refresh", refresh_steps=3
    )
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-2))
    name, layer = next(iter(layers.items()))
    core = layer.sparsegrad_values["default"]
    count = count_for_density(0.03, targets[0].out_features, targets[0].in_features)
    expected = largest_entries(scores[name], count)
    total = torch.zeros(RANK, RANK)
    for step in range(1, 8):
        before = core.detach().clone()
        optimizer.zero_grad()
        model(**batch(seed=step)).loss.backward()
        assert core.grad is not None
        total += core.grad.abs()
        optimizer.step()
        moved = torch.nonzero((core - before).view(-1)).squeeze(1)
        assert set(moved.tolist()) <= set(expected.tolist())
        assert len(moved) >= count - 1
        state = optimizer.state[core]
        assert state["positions"].tolist() == expected.tolist()  # state on those entries only
        if step % 3 == 0:
            expected, total = largest_entries(total, count), torch.zeros(RANK, RANK)


@pytest.mark.parametrize(("support", "name"), [("static", "values"), ("dynamic", "core")])
def test_checkpoints_of_earlier_versions_load(support: str, name: str, tmp_path: Path) -> None:
    """They were written when the core was a layer of its own, without PEFT."""
    bases = orthogonal_bases(targets_of(classifier()), torch.float32)
    trained, layers, _ = prepared(bases, scope="rest", support=support)
    fresh, _, method = prepared(bases, scope="rest", support=support)
    written = {}
    with torch.no_grad():
        for new, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
                old = new.replace("sparsegrad_values.default", name).replace(".base_layer.", ".")
                written[old] = parameter.detach()
    assert {f"{layer}.{name}" for layer in layers} <= written.keys()
    assert {f"{layer}.bias" for layer in layers} <= written.keys()
    save_file(written, tmp_path / "trainable.safetensors")
    load_weights(tmp_path, fresh, method)
    for (path, got), expected in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(got, expected), path


def test_the_model_is_one_of_peft() -> None:
    """PEFT's own functions read the method's model."""
    bases = orthogonal_bases(targets_of(classifier()), torch.float32)
    model, layers, method = prepared(bases)
    model_state = get_peft_model_state_dict(model)
    tensors = method.adapter_tensors(model)
    for name in layers:
        assert torch.equal(model_state[f"{name}.sparsegrad_values"], tensors[f"{name}.values"])
        assert torch.equal(model_state[f"{name}.sparsegrad_support"], tensors[f"{name}.support"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_graph_breaks(backend: str) -> None:
    targets = targets_of(classifier())
    _, layers, _ = prepared(orthogonal_bases(targets, torch.float32))
    layer = layers[targets[0].name]
    with torch.no_grad():
        layer.sparsegrad_values["default"].normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, targets[0].in_features, requires_grad=True)
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    results: list[Any] = []
    for run in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        assert x.grad is not None and layer.sparsegrad_values["default"].grad is not None
        results.append((x.grad.clone(), layer.sparsegrad_values["default"].grad.clone()))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


# BERT-base's widths, two blocks of it, 16 x 128 tokens. Counts are exact, so they are asserted.
WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


@pytest.fixture(scope="module")
def bytes_of() -> dict[str, dict[str, int]]:
    from benchmarks import models

    models.SHAPES["two-blocks"] = ("bert", {**WIDE, "num_hidden_layers": 2, "vocab_size": 1000})
    methods = methods_at(0.01, rank=160)
    try:
        return {
            name: step_bytes(methods[name], "two-blocks", 16, 128)
            for name in ("lora", "core", "lora recomputed", "core recomputed")
        }
    finally:
        del models.SHAPES["two-blocks"]


def test_peak_bytes_beyond_the_weights_are_below_loras(bytes_of: Any) -> None:
    """Both with every saving that the layers allow."""
    beyond = {name: found["beyond"] for name, found in bytes_of.items()}
    assert abs(bytes_of["core"]["trainable"] / bytes_of["lora"]["trainable"] - 1) < 0.03
    assert beyond["core"] <= 0.87 * beyond["lora"]
    assert beyond["core recomputed"] <= 0.89 * beyond["lora recomputed"]


@pytest.mark.slow
def test_peak_bytes_of_all_of_bert_base() -> None:
    """Twelve blocks: what is transient weighs less than in two."""
    methods = methods_at(0.01, rank=160)
    lora, core, lean_lora, lean = (
        step_bytes(methods[name], "shapes:bert-base", 16, 128)
        for name in ("lora", "core", "lora recomputed", "core recomputed")
    )
    assert core["beyond"] <= 0.80 * lora["beyond"]
    assert core["beyond"] + core["bases"] <= 0.84 * lora["beyond"]
    assert lean["beyond"] <= 0.80 * lean_lora["beyond"]


def test_saved_bytes_are_those_of_the_written_count(bytes_of: Any) -> None:
    """Of LoRA's saved activations the core form drops x and h; all else is saved alike."""
    tokens, hidden, inner, rank, lora_rank = 16 * 128, 768, 3072, 160, 6
    lora = bytes_of["lora"]["saved_after_forward"]
    core = bytes_of["core"]["saved_after_forward"]
    dropped = 4 * tokens * (hidden + inner) * 2  # x of the up and the down projection, two blocks
    kept = 4 * tokens * (rank - lora_rank) * 4  # u = x Q_in in place of x A', four targets
    # S itself, per target.
    kept += 4 * 4 * rank * rank
    assert lora - core == pytest.approx(dropped - kept, abs=4096)
    assert methods_at(0.01, rank)["core"].calibrates


@pytest.mark.parametrize(
    ("more", "trained"),
    [({"rank": 1, "density": 0.5}, 6), ({"rank": 8, "density": 0.5}, 6 * 64)],
)
def test_a_core_that_is_too_small_for_the_density_is_noted(more: Any, trained: int) -> None:
    targets = targets_of(classifier())
    asked = sum(round(0.5 * target.size) for target in targets)
    (note,) = settings(**more).notes_on(TargetShapes(targets))
    assert note.startswith(
        f"cores of rank {more['rank']} train {trained:,} of the {asked:,} parameters that "
        "method.density asks for"
    )
    (before,) = settings(**more).notes
    assert f"asks for more in target modules of more than {2 * more['rank'] ** 2}" in before
    given = settings(**{**more, "density": None, "entries": trained})
    assert given.notes_on(TargetShapes(targets)) == given.notes == []


def test_cores_of_a_size_that_follows_give_no_note() -> None:
    shapes = TargetShapes(targets_of(classifier()))
    for more in ({"rank": None}, {"support": "dense"}, {"rank": 0.9}, {"rank": 8, "density": 0.05}):
        settled = settings(**more).settle(shapes)
        assert settled.notes_on(shapes) == []


def test_validate_prints_the_note(cli: Cli) -> None:
    outcome = cli("validate", "method.rank=1", "method.density=0.5")
    assert outcome.code == 0
    assert "note: cores of method.rank 1 are at most 1 x 1: method.density 0.5" in outcome.flat
