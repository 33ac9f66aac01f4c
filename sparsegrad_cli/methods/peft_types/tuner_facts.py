"""What we know of each PEFT type: what sets its size, what is saved, why it is refused. No torch.

Checked with peft 0.21.2. ``benchmarks/peft_types.py`` measures the same on models, and
``tests/methods/test_peft_types.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SizeKind = Literal["number", "falling", "power", "falling power", "share", "falling share"]

SHIRA_MASKS = ("random", "struct", "wm", "grad", "snip")
"""Values of SHiRA's mask_type; PEFT has the first, and shira_masks.py the others."""

_TOP = 1 << 24  # a falling number is this less the size
_TOP_POWER = 24  # the exponent of a falling power is this less the size
_SHARES = 100_000  # steps of a share between 0 and 1


@dataclass(frozen=True)
class SizeKey:
    """The key that sets how many parameters a tuner trains.

    A budget chooses a whole number, the size; more parameters train at a larger one. How the value
    of the key follows from the size depends on the kind: the number itself, a power of two, a share
    of 100,000, or one of these that falls while the number of parameters grows.

    Attributes:
        key: the key of PEFT's configuration.
        kind: how the value follows from the size.
        least: the smallest value of a number, or the smallest power of two.
        times: another key, and PEFT's default for it, whose multiples the value must be.
    """

    key: str
    kind: SizeKind = "number"
    least: int = 1
    times: tuple[str, int] | None = None

    def value(self, size: int, keys: Mapping[str, Any]) -> int | float:
        """Return the key's value at a size, beside other keys that are set."""
        if self.times is not None:
            key, default = self.times
            return size * int(keys.get(key, default))
        match self.kind:
            case "falling":
                return _TOP - size
            case "power":
                return 1 << size
            case "falling power":
                return 1 << (_TOP_POWER - size)
            case "share":
                return size / _SHARES
            case "falling share":
                return (_SHARES - size) / _SHARES
            case _:
                return size

    def bounds(self, narrow: int, divisor: int) -> tuple[int, int]:
        """Return the smallest and largest size on these layers.

        Args:
            narrow: the narrow side of the widest layer.
            divisor: the largest power of two that divides every side.
        """
        exponent = divisor.bit_length() - 1
        match self.kind:
            case "falling":
                return _TOP - narrow, _TOP - self.least
            case "power":
                return self.least, exponent
            case "falling power":
                return _TOP_POWER - exponent, _TOP_POWER - self.least
            case "share" | "falling share":
                return 1, _SHARES
            case _:
                return self.least, narrow


@dataclass(frozen=True)
class Tuner:
    """One PEFT type.

    Attributes:
        size: what sets its number of parameters; None if it has one size.
        most: the largest size where it is not the narrow side of the layers.
        saved: attributes of its layers that hold one tensor per adapter and are saved with the
            trained parameters, because loading cannot compute them again for certain.
        refusal: why it is not a method here.
        merge_refusal: why it cannot be merged.
        start: why the model computes another function at the start than the base model.
        values: why its memory cannot be counted without weights.
        few: whether it trains so few parameters that larger learning rates suit it.
        beside: whether a change beside the weights trains.
        defaults: settings that differ from PEFT's own, and why they do is said beside them.
        fits: key whose default must divide sides of the layers: PEFT's own is made smaller.
        shared: whether all layers share one set of trained parameters.
    """

    size: SizeKey | None = None
    most: int | None = None
    saved: tuple[str, ...] = ()
    refusal: str = ""
    merge_refusal: str = ""
    start: str = ""
    values: str = ""
    few: bool = False
    beside: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fits: str | None = None
    shared: bool = False


_R = SizeKey("r")
_PROMPT = "it trains prompts or prefixes, not target modules, and cannot be merged"


def _refused(why: str) -> Tuner:
    return Tuner(refusal=why)


TUNERS: dict[str, Tuner] = {
    "ADALORA": Tuner(SizeKey("init_r")),
    "ADAMSS": Tuner(
        SizeKey("num_subspaces"),
        saved=("adamss_newB",),
        values="it clusters the rows of the weights",
    ),
    "BEFT": Tuner(few=True),
    "BOFT": Tuner(SizeKey("boft_block_size", "power"), few=True, fits="boft_block_size"),
    "C3A": Tuner(
        SizeKey("block_size", "falling power", 0),
        fits="block_size",
        start="C3A draws its kernels at random",
    ),
    "DEFT": Tuner(_R),
    "DELORA": Tuner(_R, saved=("delora_w_norm",)),
    "FOURIERFT": Tuner(
        SizeKey("n_frequency"), most=1 << 24, few=True, start="FourierFT draws its spectrum"
    ),
    "FROD": Tuner(
        SizeKey("sparse_rate", "share"),
        few=True,
        values="it decomposes the weights of all layers together",
        defaults={"progressbar": False},
    ),
    "GLORA": Tuner(_R),
    "GRALORA": Tuner(SizeKey("r", times=("gralora_k", 2))),
    "HIRA": Tuner(_R),
    "HRA": Tuner(_R),
    # l_ff scales the outputs of every target: which of them reads another's output is not known.
    "IA3": Tuner(few=True, defaults={"feedforward_modules": []}),
    "LILY": Tuner(_R, merge_refusal="its router weighs the factors differently for every token"),
    "LN_TUNING": Tuner(beside=False, values="PEFT copies whole layers, with their values"),
    "LOHA": Tuner(_R),
    "LOKR": Tuner(_R),
    "LORA": Tuner(_R),
    "MISS": Tuner(_R),
    "OFT": Tuner(SizeKey("oft_block_size", "power"), few=True, fits="oft_block_size"),
    "OSF": Tuner(SizeKey("effective_rank", "falling"), beside=False),
    "PEANUT": Tuner(_R),
    "PSOFT": Tuner(_R, saved=("_psoft_A_cache", "_psoft_B_cache"), few=True),
    "PVERA": Tuner(_R, most=1 << 16, few=True),
    "RANDLORA": Tuner(SizeKey("r", "falling"), few=True),
    "ROAD": Tuner(few=True, fits="group_size"),
    "SHIRA": Tuner(
        _R, saved=("shira_indices",), values="its mask is turned into a list of positions"
    ),
    "SUPERTUNING": Tuner(SizeKey("sparsity", "falling share"), saved=("supertuning_indices",)),
    "TINYLORA": Tuner(SizeKey("u"), most=1 << 14, saved=("tinylora_A", "tinylora_B"), few=True),
    "UNILORA": Tuner(
        SizeKey("theta_d_length"),
        most=1 << 24,
        shared=True,
        values="it counts how often each of its parameters is used",
        start="Uni-LoRA draws its vector at random",
    ),
    "VBLORA": Tuner(
        SizeKey("num_vectors", least=2),
        most=1 << 16,
        fits="vector_length",
        values="PEFT checks its values in every step",
        start="VB-LoRA draws its bank of vectors at random",
    ),
    "VERA": Tuner(_R, most=1 << 16, few=True),
    "WAVEFT": Tuner(SizeKey("n_frequency"), most=1 << 24, few=True),
    # --- refused
    "ADAPTION_PROMPT": _refused(_PROMPT),
    "CARTRIDGE": _refused(_PROMPT),
    "CPT": _refused(_PROMPT),
    "MULTITASK_PROMPT_TUNING": _refused(_PROMPT),
    "P_TUNING": _refused(_PROMPT),
    "PREFIX_TUNING": _refused(_PROMPT),
    "PROMPT_TUNING": _refused(_PROMPT),
    "POLY": _refused("it needs the number of a task with every example"),
    "SHADOW": _refused("it trains a second model beside the first, not target modules"),
    "TRAINABLE_TOKENS": _refused("it trains rows of the embedding, which is no target module"),
    "XLORA": _refused("it mixes LoRA adapters that were trained before"),
}

RUNNING = tuple(sorted(name for name, tuner in TUNERS.items() if not tuner.refusal))

# Method names beside those of the types: variants of LoRA, and the names that papers use.
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"name": "lora", "rslora": True},
    "dora": {"type": "LORA", "use_dora": True},
    "pissa": {"type": "LORA", "init_lora_weights": "pissa"},
    "olora": {"type": "LORA", "init_lora_weights": "olora"},
    "orthogonal": {"type": "LORA", "init_lora_weights": "orthogonal"},
    "mica": {"type": "LORA", "init_lora_weights": "mica"},
    "eva": {"type": "LORA", "init_lora_weights": "eva"},
    "corda": {"type": "LORA", "init_lora_weights": "corda"},
    "lora_ga": {"type": "LORA", "init_lora_weights": "lora_ga"},
    "kasa": {"type": "LORA", "kasa_config": {}},
    "monteclora": {"type": "LORA", "monteclora_config": {}},
    "velora": {"type": "LORA", "velora_config": {}},
}
ALIASES: dict[str, dict[str, Any]] = {
    **{name.lower(): {"type": name} for name in TUNERS if name != "LORA"},
    **VARIANTS,
}

_TARGETS = "the recipe's targets say it: targets.modules and targets.blocks"
# Keys of PEFT's configurations that follow from other sections of a recipe.
REPLACED: dict[str, str] = {
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "layers_to_transform": "the recipe's targets say it: targets.blocks",
    "layers_pattern": "the recipe's targets say it: targets.blocks",
    "target_parameters": _TARGETS,
    "feedforward_modules": _TARGETS,
    "modules_to_save": "the head always trains; scope: rest trains everything else too",
    "bias": "scope: rest trains the biases, with everything else",
    "trainable_token_indices": "scope: rest trains the embeddings, with everything else",
    "task_type": "task.name says it",
    "peft_type": "method.type says it",
    "base_model_name_or_path": "model.name says it",
    "revision": "model.revision says it",
    "total_step": "train.max_steps or train.num_train_epochs says it",
    "fan_in_fan_out": "it is read off the layers",
}
# Keys without effect here, or for another use of PEFT.
USELESS: dict[str, str] = {
    **dict.fromkeys(
        ("inference_mode", "auto_mapping", "peft_version"), "PEFT writes it into its files"
    ),
    **dict.fromkeys(
        (
            "save_projection",
            "save_indices",
            "save_precomputed_indices",
            "save_only_topk_weights",
        ),
        "the adapter holds what loading cannot compute again",
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "Megatron is not used"),
    "progressbar": "the run shows its own progress",
    "runtime_config": "it is for loading",
    "runtime_offload_base_weight": "weights stay on their device",
    "layer_replication": "the model keeps its layers",
    "ensure_weight_tying": "embeddings are not target modules",
    "loftq_config": "quantized weights are loaded as they are: model.quantization",
    "arrow_config": "it routes between adapters that were trained before",
    "alora_invocation_tokens": "it needs invocation tokens in every example",
    "use_qalora": "it needs weights in GPTQ format",
    "qalora_group_size": "it needs weights in GPTQ format",
    "use_bdlora": "it is for serving on several devices",
    "use_asa": "its allocation needs a callback of Trainer",
}


def size_keys() -> frozenset[str]:
    """Return the keys that set the size of some type."""
    return frozenset(tuner.size.key for tuner in TUNERS.values() if tuner.size)
