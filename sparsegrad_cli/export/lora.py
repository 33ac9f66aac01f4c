"""Write the LoRA form: a PEFT folder with low-rank factors, and whole modules for the rest."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.export.base_model import (
    CLASSIFIER,
    LANGUAGE_MODEL,
    PEFT_TASKS,
    BaseModel,
    auto_class,
    changed_parameters,
    plain_model,
    put,
)
from sparsegrad_cli.export.merged import RelativeError, generation_config, put_weight
from sparsegrad_cli.methods.implementation import Factors
from sparsegrad_cli.methods.peft_folder import check_adapted, modules_to_save, target_settings
from sparsegrad_cli.models.quantized import move_model
from sparsegrad_cli.models.targets import Target, has_experts
from sparsegrad_cli.numerics.lowrank import nearest_of_rank
from sparsegrad_cli.restore.restore import TrainedModel

# The ranks that vLLM supports (its --max-lora-rank). Other servers support any of them.
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class LoraParts:
    """The content of a LoRA folder.

    Attributes:
        factors: Target name -> its change. All have the same rank; some are padded with zeros.
        biases: Target name -> change of its bias, shape (out,).
        modules: Full names of the modules that are saved whole.
        tensors: Plain name -> value of each parameter in those modules.
        rank: The rank of all factors.
        truncated: Whether some change has a higher rank than its factors.
        record: ``rank``, ``truncated``, ``error``, ``modules`` and a row per target.
    """

    factors: dict[str, Factors]
    biases: dict[str, Tensor]
    modules: list[str]
    tensors: dict[str, Tensor]
    rank: int
    truncated: bool
    record: dict[str, Any]


def lora_parts(
    trained: TrainedModel, plain: nn.Module, *, rank: int | None, server_rank: bool
) -> LoraParts:
    """Factor the change of every target module and collect all other changed parameters.

    All factors get the same rank and a scale of 1, since some libraries support nothing else.

    Args:
        trained: The run.
        plain: Its base model.
        rank: Truncate every change to this rank; None keeps the exact change.
        server_rank: Pad with zeros to one of ``SERVER_RANKS``; truncate to the highest.

    Raises:
        UsageError: The change has full rank and no rank was given, or a changed parameter cannot be
            stored in a LoRA folder.
    """
    targets = {target.name: target for target in trained.setup.targets}
    changed = changed_parameters(plain, trained)
    biases = {
        name: changed.pop(f"{name}.bias").detach().double()
        - plain.get_parameter(f"{name}.bias").detach().double()
        for name in targets
        if f"{name}.bias" in changed
    }
    for name, target in targets.items():
        bias = trained.method.merged_bias(trained.setup.model, target)
        if bias is not None:
            biases[name] = bias - plain.get_parameter(f"{name}.bias").detach().double()
    modules = _whole_modules(plain, changed, targets)
    limit = math.inf if rank is None else rank
    if server_rank:
        limit = min(limit, SERVER_RANKS[-1])
    factors: dict[str, Factors] = {}
    total, rows, truncated = RelativeError(), [], False
    for name, target in targets.items():
        exact = trained.method.factors(trained.setup.model, target)
        if exact is None and rank is None:
            raise UsageError(
                "this method has no low-rank factors: the change has full rank",
                where="--rank",
                fix="give a --rank to truncate to (the error is stated), or use --to merged",
            )
        base_OI = target.in_model(plain).weight_OI(plain).detach().double()
        change_OI = trained.method.merged_OI(trained.setup.model, target) - base_OI
        factors[name] = _truncated(exact, change_OI, limit)
        full_rank = exact.rank if exact is not None else min(change_OI.shape)
        truncated = truncated or factors[name].rank < full_rank
        error = total.add(factors[name].product_OI() - change_OI, change_OI)
        rows.append({"name": name, "rank": factors[name].rank, "error": error})
    common = max(each.rank for each in factors.values())
    if server_rank:
        common = next(each for each in SERVER_RANKS if each >= common)
    record = {
        "rank": common,
        "truncated": truncated,
        "error": total.value,
        "targets": rows,
        "modules": modules,
    }
    padded = {name: each.padded(common) for name, each in factors.items()}
    return LoraParts(padded, biases, modules, changed, common, truncated, record)


def _whole_modules(
    plain: nn.Module, changed: dict[str, Tensor], targets: dict[str, Target]
) -> list[str]:
    classifier = auto_class(plain) == CLASSIFIER
    modules, beside = modules_to_save(plain, changed, targets, classifier=classifier)
    if beside:
        raise UsageError(
            f"a LoRA folder cannot hold {beside[0]}, which training changed: PEFT saves whole "
            "modules only, and its module contains a target",
            where="--to lora",
            fix="--to merged",
        )
    return modules


def _truncated(exact: Factors | None, change_OI: Tensor, limit: float) -> Factors:
    """Return factors with a scale of 1 and a rank of at most ``limit``."""
    if exact is not None and exact.rank <= limit:
        return exact.folded()
    b_OR, a_RI = nearest_of_rank(change_OI, int(limit))
    return Factors(b_OR, a_RI, a_RI.shape[0]).folded()


def reference(trained: TrainedModel, parts: LoraParts) -> nn.Module:
    """Return the plain model with the parts merged, which a truncated export must reproduce."""
    plain = plain_model(trained)
    put(plain, parts.tensors)
    for target in trained.setup.targets:
        base_OI = target.in_model(plain).weight_OI(plain).detach().double()
        put_weight(plain, target, base_OI + parts.factors[target.name].product_OI())
        if target.name in parts.biases:
            bias = plain.get_parameter(f"{target.name}.bias")
            put(plain, {f"{target.name}.bias": bias.double() + parts.biases[target.name]})
    return plain


def write_lora(
    plain: nn.Module, parts: LoraParts, trained: TrainedModel, base: BaseModel, folder: Path
) -> None:
    """Write the parts with PEFT, and the tokenizer and generation settings.

    Args:
        plain: The base model; adapters are put into it.
        parts: What to write.
        trained: The run.
        base: How users load the base model.
        folder: An existing folder.
    """
    from peft import get_peft_model

    put(plain, parts.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About fan_in_fan_out of Conv1D and tied embeddings.
        wrapped = get_peft_model(plain, _peft_config(plain, parts, trained))
        inner: Any = wrapped.get_base_model()
        check_adapted(inner, parts.factors, "--to merged")
        with torch.no_grad():
            for name, factors in parts.factors.items():
                layer: Any = inner.get_submodule(name)
                layer.lora_A["default"].weight.data = factors.a.contiguous()
                layer.lora_B["default"].weight.data = factors.b.contiguous()
                if name in parts.biases:
                    layer.lora_B["default"].bias.data = parts.biases[name].float()
        # PEFT would write the name of the base model as given, and a relative path can move.
        config = wrapped.peft_config["default"]
        config.base_model_name_or_path = base.source
        config.revision = base.arguments.get("revision")
        if config.modules_to_save:  # PEFT has added its own heads to the list.
            config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer = trained.setup.tokenizer
    tokenizer.save_pretrained(folder)
    if base.auto == LANGUAGE_MODEL:
        generation_config(inner, tokenizer).save_pretrained(folder)


def _peft_config(plain: nn.Module, parts: LoraParts, trained: TrainedModel) -> Any:
    from peft import LoraConfig

    settings = target_settings(plain, parts.factors, getattr(trained.settings, "dropout", 0.0))
    if has_experts(plain) and parts.biases:
        raise UsageError(
            "a LoRA folder of a mixture-of-experts model cannot hold biases of targets, which "
            "training changed",
            where="--to lora",
            fix="--to merged",
        )
    return LoraConfig(
        task_type=PEFT_TASKS[auto_class(plain)],
        r=parts.rank,
        lora_alpha=parts.rank,
        **settings,
        lora_bias=bool(parts.biases),
        modules_to_save=list(parts.modules) or None,
        fan_in_fan_out=any(t.in_model(plain).transposed for t in trained.setup.targets),
    )


def load_lora(base: BaseModel, folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load a written folder with PEFT onto its base model."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = PeftModel.from_pretrained(base.load(device), str(folder))
    return move_model(loaded, device)
