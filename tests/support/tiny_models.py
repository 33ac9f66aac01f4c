"""Tiny random models of many architectures, and batches for them: real classes, real code paths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.calibration.calibrate import Calibration, calibrate
from sparsegrad_cli.calibration.diagnostics import KindGrams
from sparsegrad_cli.methods import registry
from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.full.settings import FullSettings
from sparsegrad_cli.methods.implementation import Prepared, TrainingData
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.neighbours.adaptive_settings import SaraSettings
from sparsegrad_cli.methods.neighbours.change import ChangedLinear
from sparsegrad_cli.methods.neighbours.factor_settings import PelaSettings, WeloreSettings
from sparsegrad_cli.methods.neighbours.gradient_settings import (
    DctAdamwSettings,
    FiraSettings,
    FrugalSettings,
    GaloreSettings,
    GradnormlorpSettings,
)
from sparsegrad_cli.methods.peft_types.settings import PeftSettings
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.targets import Target, find_targets
from sparsegrad_cli.numerics.hosvd import Basis, Stream
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.peft import SparseGradLayer
from sparsegrad_cli.recipe.schema import CalibrationSection, TargetsSection, TrainSection

VOCABULARY, HIDDEN, INNER, BLOCKS, POSITIONS = 67, 16, 40, 3, 32

_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 1}

# name -> (model_type of transformers, configuration). Heads of 12 make attention non-square.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _ENCODER),
    "roberta": ("roberta", _ENCODER),
    "distilbert": (
        "distilbert",
        {
            "dim": HIDDEN,
            "n_layers": BLOCKS,
            "n_heads": 2,
            "hidden_dim": INNER,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "electra": ("electra", {**_ENCODER, "embedding_size": 8}),
    "mpnet": ("mpnet", {**_ENCODER, "pad_token_id": 1}),
    "deberta-v3": (
        "deberta-v2",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "n_embd": HIDDEN,
            "n_layer": BLOCKS,
            "n_head": 2,
            "n_inner": INNER,
            "n_positions": POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "llama": ("llama", _DECODER),
    "mistral": ("mistral", _DECODER),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 12}),
    "gemma": ("gemma", {**_DECODER, "head_dim": 12}),
    "opt": (
        "opt",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "ffn_dim": INNER,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": HIDDEN,
        },
    ),
    "t5": (
        "t5",
        {"d_model": HIDDEN, "d_kv": 12, "d_ff": INNER, "num_layers": BLOCKS, "num_heads": 2},
    ),
}


@contextmanager
def one_thread() -> Iterator[None]:
    """On tiny tensors, threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def config(architecture: str, **overrides: Any) -> Any:
    """A transformers configuration of a few thousand parameters; ``overrides`` are its own keys."""
    from transformers import AutoConfig

    model_type, settings = ARCHITECTURES[architecture]
    merged = {"vocab_size": VOCABULARY, "pad_token_id": 0, **settings, **overrides}
    return AutoConfig.for_model(model_type, **merged)


def build(loader: Any, settings: Any, seed: int = 0) -> nn.Module:
    """A random model by ``loader`` (an Auto class or a model class), seeded; eval mode.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = getattr(loader, "from_config", loader)
        model: nn.Module = make(settings)
    return model.eval()


def classifier(
    architecture: str = "bert", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> nn.Module:
    """A tiny sequence classifier with two labels."""
    from transformers import AutoModelForSequenceClassification

    settings = config(architecture, num_labels=2, **overrides)
    return build(AutoModelForSequenceClassification, settings, seed).to(dtype)


def batch(size: int = 8, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Token ids without padding, and labels that depend on the first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": (ids[:, 0] > VOCABULARY // 2).long(),
    }


def batches(size: int = 8, seed: int = 100) -> Iterator[dict[str, Tensor]]:
    """Endless different batches."""
    while True:
        yield batch(size, seed=seed)
        seed += 1


def three_batches() -> list[dict[str, Tensor]]:
    """The first three of them."""
    return list(islice(batches(), 3))


def targets_of(model: nn.Module, **section: Any) -> list[Target]:
    """The targets that the recipe section finds."""
    return find_targets(model, TargetsSection(**section))


@dataclass
class Found(Calibration):
    """A calibration whose sums were kept, by key."""

    streams: dict[str, Stream] = field(default_factory=dict)

    def per_kind(self, targets: list[Target]) -> dict[str, Basis]:
        """Bases of whole kinds, as ``sparsegrad calibrate`` makes them from the sums."""
        kinds = KindGrams(targets, self.keys)
        for key, stream in self.streams.items():
            kinds.add(key, copy.deepcopy(stream))
        return kinds.bases()


def found_by(model: nn.Module, *arguments: Any, **named: Any) -> Found:
    """Calibration that keeps its sums; arguments are those of :func:`calibrate`."""
    streams: dict[str, Stream] = {}
    found = calibrate(model, *arguments, on_stream=streams.__setitem__, **named)
    return Found(**vars(found), streams=streams)


def calibrated(
    model: nn.Module,
    targets: list[Target],
    stream: Callable[[], Iterator[dict[str, Tensor]]] = batches,
    *,
    seed: int = 0,
    rank: int | float | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    **section: Any,
) -> Found:
    """Calibration with the settings of a recipe's section."""
    settings = CalibrationSection(**section)
    return found_by(model, targets, stream, settings, seed=seed, rank=rank, on_step=on_step)


def orthogonal_bases(
    targets: list[Target], dtype: torch.dtype = torch.float64, seed: int = 5
) -> dict[str, Basis]:
    """Random full-rank bases, orthonormal to the precision of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(side: int) -> Tensor:
        square = torch.randn(side, side, generator=generator, dtype=torch.float64)
        q: Tensor = torch.linalg.qr(square).Q
        return q.to(dtype)

    return {
        t.name: Basis(
            orthogonal(t.out_features),
            orthogonal(t.in_features),
            torch.ones(t.out_features),
            torch.ones(t.in_features),
        )
        for t in targets
    }


def run_data(model: nn.Module, steps: int, count: int = 3) -> TrainingData:
    """What a method may use of a run with this many steps and ``count`` calibration batches."""
    return TrainingData(
        steps=steps,
        batches=lambda: islice(batches(), count),
        loss=lambda inputs: model(**inputs).loss,
    )


# name -> (settings, basis_per for methods that need a basis)
METHODS: dict[str, tuple[MethodSettings, str | None]] = {
    "full": (FullSettings(name="full"), None),
    "lora": (LoraSettings(name="lora", rank=2), None),
    "dora": (
        PeftSettings.model_validate({"name": "peft", "type": "LORA", "use_dora": True, "r": 2}),
        None,
    ),
    "meprop-entries": (MepropSettings(name="meprop", density=0.05), None),
    "meprop-rows": (MepropSettings(name="meprop", density=0.1, select="rows"), None),
    "meprop-unified": (
        MepropSettings(name="meprop", density=0.1, select="rows", unified=True),
        None,
    ),
    "materialized-layer": (
        SparsegradSettings(name="sparsegrad", density=0.05, form="materialized"),
        "layer",
    ),
    "materialized-kind": (
        SparsegradSettings(name="sparsegrad", density=0.05, form="materialized"),
        "kind",
    ),
    "rotated-layer": (
        SparsegradSettings(name="sparsegrad", density=0.05, form="rotated"),
        "layer",
    ),
    "rotated-kind": (
        SparsegradSettings(name="sparsegrad", density=0.05, form="rotated"),
        "kind",
    ),
    "core-static": (
        SparsegradSettings(name="sparsegrad", density=0.05, form="core", support="static", rank=8),
        "layer",
    ),
    "core-dynamic": (
        SparsegradSettings(
            name="sparsegrad", density=0.05, form="core", support="dynamic", rank=1.0
        ),
        "kind",
    ),
    "core-refresh": (
        SparsegradSettings(
            name="sparsegrad",
            density=0.05,
            form="core",
            support="refresh",
            refresh_steps=2,
            rank=8,
        ),
        "layer",
    ),
    "core-bounded": (
        SparsegradSettings(
            name="sparsegrad",
            density=0.05,
            form="core",
            support="dynamic",
            rank=9,
            state_capacity=1.5,
        ),
        "layer",
    ),
    "meprop-bounded": (MepropSettings(name="meprop", density=0.05, state_capacity=1.5), None),
    "materialized-bounded": (
        SparsegradSettings(
            name="sparsegrad", density=0.05, form="materialized", state_capacity=1.5
        ),
        "layer",
    ),
    "core-dense": (
        SparsegradSettings(name="sparsegrad", form="core", support="dense", rank=6),
        "layer",
    ),
    # Chosen again within the few steps of a test.
    "galore": (GaloreSettings(name="galore", rank=3, update_every=3), None),
    "fira": (FiraSettings(name="fira", rank=3, update_every=3), None),
    "dct_adamw": (DctAdamwSettings(name="dct_adamw", rank=3, update_every=3), None),
    "frugal": (FrugalSettings(name="frugal", update_every=3), None),
    "sara": (SaraSettings(name="sara", density=0.05), None),
    "gradnormlorp": (GradnormlorpSettings(name="gradnormlorp", rank=4, update_every=3), None),
    # Factors of lower rank are not stable on tiny layers at the learning rate of the tests.
    "welore": (WeloreSettings(name="welore", allocation="uniform", reduction=0.4), None),
    "pela": (PelaSettings(name="pela", compression=1.1), None),
}


# Registered methods that no variant above stands for.
METHODS |= {
    name: (settings(name=name), "layer" if settings(name=name).calibrates else None)
    for name, settings in registry.METHODS.items()
    if name not in {known.name for known, _ in METHODS.values()}
}


# Bases that :class:`Tuned` has calibrated, by architecture, seed, basis_per and overrides.
CALIBRATED: dict[tuple[Any, ...], dict[str, Basis]] = {}


class Tuned:
    """A tiny model made ready by a method, with its optimizer.

    Args:
        name: key of ``METHODS``.
        architecture: key of ``ARCHITECTURES``.
        seed: of the model, the calibration and what the method draws.
        run_steps: number of steps of the run that the method learns of, with its batches.
    """

    def __init__(
        self,
        name: str,
        architecture: str = "bert",
        *,
        scope: str = "head",
        seed: int = 0,
        train: TrainSection | None = None,
        run_steps: int | None = None,
        **overrides: Any,
    ) -> None:
        settings, basis_per = METHODS[name]
        if settings.reads_batches and run_steps is None:
            run_steps = 50
        self.model = classifier(architecture, seed, **overrides)
        self.targets = targets_of(self.model)
        save_memory(self.model, self.targets, settings.recompute)
        bases = None
        if basis_per is not None:
            key = (architecture, seed, basis_per, *sorted(overrides.items()))
            if key not in CALIBRATED:
                CALIBRATED[key] = calibrated(
                    self.model, self.targets, steps=3, basis_per=basis_per, seed=seed
                ).by_target()
            bases = copy.deepcopy(CALIBRATED[key])
        self.method: Any = settings.implementation()
        with temporary_seed(seed):
            self.prepared: Prepared = self.method.prepare(
                self.model,
                self.targets,
                scope=scope,
                bases=bases,
                training=None if run_steps is None else run_data(self.model, run_steps),
            )
        self.train = train or TrainSection(learning_rate=1e-2)
        self.optimizer = self.method.optimizer(self.model, self.train)

    def steps(self, count: int, seed: int = 0, start: int = 0) -> list[float]:
        """Training steps on batches that differ; returns the losses."""
        losses = []
        self.model.train()
        with temporary_seed(seed):
            for number in range(start, start + count):
                losses.append(self.step(batch(seed=1000 + number)))
        self.model.eval()
        return losses

    def step(self, inputs: dict[str, Tensor]) -> float:
        """One optimizer step on one batch; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def logits(self) -> Tensor:
        """On one batch, in eval mode."""
        return logits(self.model)


def logits(model: nn.Module) -> Tensor:
    """On one batch, in eval mode."""
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch(seed=7)).logits
    return found


def weight_of(model: nn.Module, target: Target) -> nn.Parameter:
    """What trains in a target as its layer holds it: W, W' (Conv1D), the core, or values."""
    layer = model.get_submodule(target.name)
    if isinstance(layer, ChangedLinear):
        layer = layer.change
        return layer.get_parameter("values")
    weight: Any = layer.weight
    if isinstance(layer, SparseGradLayer):
        weight = layer.sparsegrad_values["default"]
    assert isinstance(weight, nn.Parameter)
    return weight


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
