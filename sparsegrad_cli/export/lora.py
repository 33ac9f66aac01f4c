"""A PEFT LoRA folder: factors of each target's change, and whole modules for what else changed."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.export.base_model import BaseModel
from sparsegrad_cli.export.merged import (
    AUTO_CLASSES,
    Distance,
    auto_class,
    differing,
    plain_model,
    put,
    put_weight,
)
from sparsegrad_cli.export.options import SERVER_RANKS
from sparsegrad_cli.export.rebuild import Trained
from sparsegrad_cli.methods.implementation import Factors
from sparsegrad_cli.methods.peft_folder import check_adapted, modules_to_save, target_settings
from sparsegrad_cli.models.targets import has_experts
from sparsegrad_cli.numerics.lowrank import nearest_of_rank


@dataclass
class LoraParts:
    """What a LoRA folder will hold.

    Attributes:
        factors: target name -> its change.
        biases: target name -> change of its bias, (out,).
        modules: full names of the modules that go along whole.
        tensors: plain name -> what the parameters in them hold.
        rank: of all factors, some of which are padded with zeros to it.
        truncated: some change is of a higher rank than its factors.
        record: ``rank``, ``truncated``, ``error``, ``modules`` and one row a target, for
            export.json.
    """

    factors: dict[str, Factors]
    biases: dict[str, Tensor]
    modules: list[str]
    tensors: dict[str, Tensor]
    rank: int
    truncated: bool
    record: dict[str, Any] = field(default_factory=dict)


def lora_parts(
    trained: Trained, plain: nn.Module, rank: int | None, *, server: bool = False
) -> LoraParts:
    """Factors of every target's change, cut to ``rank``, and what must go along.

    All factors are of one rank and unscaled, for there are readers that take no other.

    Args:
        plain: the base model.
        rank: None keeps what is exact.
        server: of a rank that servers take.

    Raises:
        UsageError: the change is of full rank and no rank was given, or a parameter changed that
            no LoRA folder can hold.
    """
    targets = {target.name: target for target in trained.setup.targets}
    changed = differing(plain, trained)
    biases = {
        name: changed.pop(f"{name}.bias").detach().double()
        - plain.get_parameter(f"{name}.bias").detach().double()
        for name in targets
        if f"{name}.bias" in changed
    }
    classifier = AUTO_CLASSES[auto_class(plain)] == "SEQ_CLS"
    modules, beside = modules_to_save(plain, changed, targets, classifier=classifier)
    if beside:
        raise UsageError(
            f"a LoRA folder cannot hold {beside[0]}, which training changed: it can carry whole "
            "modules only, and this one holds a target",
            where="--to lora",
            fix="--to merged",
        )
    limit = math.inf if rank is None else rank
    if server:
        limit = min(limit, SERVER_RANKS[-1])
    factors: dict[str, Factors] = {}
    whole, rows, cut = Distance(), [], False
    for name, target in targets.items():
        exact = trained.method.factors(trained.setup.model, target)
        if exact is None and rank is None:
            raise UsageError(
                "this method changes the weights themselves: the change is of full rank",
                where="--rank",
                fix="give --rank, at which the change is cut (the error is stated), or --to merged",
            )
        base_OI = target.within(plain).weight_OI(plain).detach().double()
        change_OI = trained.method.merged_OI(trained.setup.model, target) - base_OI
        factors[name] = _cut(exact, change_OI, limit)
        full = exact.rank if exact is not None else min(change_OI.shape)
        cut = cut or factors[name].rank < full
        error = whole.add(factors[name].product_OI() - change_OI, change_OI)
        rows.append({"name": name, "rank": factors[name].rank, "error": error})
    common = max(each.rank for each in factors.values())
    if server:
        common = next(each for each in SERVER_RANKS if each >= common)
    factors = {name: each.padded(common) for name, each in factors.items()}
    record = {
        "rank": common,
        "truncated": cut,
        "error": whole.relative,
        "targets": rows,
        "modules": modules,
    }
    return LoraParts(factors, biases, modules, changed, common, cut, record)


def _cut(exact: Factors | None, change_OI: Tensor, limit: float) -> Factors:
    """Folded factors of a rank of at most ``limit``."""
    if exact is not None and exact.rank <= limit:
        return exact.folded()
    b_OR, a_RI = nearest_of_rank(change_OI, int(limit))
    return Factors(b_OR, a_RI, a_RI.shape[0]).folded()


def reference(trained: Trained, parts: LoraParts) -> nn.Module:
    """The plain model with the cut change in its weights: what the folder must compute exactly."""
    plain = plain_model(trained)
    put(plain, parts.tensors)
    for target in trained.setup.targets:
        base_OI = target.within(plain).weight_OI(plain).detach().double()
        put_weight(plain, target, base_OI + parts.factors[target.name].product_OI())
        if target.name in parts.biases:
            bias = plain.get_parameter(f"{target.name}.bias")
            put(plain, {f"{target.name}.bias": bias.double() + parts.biases[target.name]})
    return plain


def write_lora(
    plain: nn.Module, parts: LoraParts, trained: Trained, base: BaseModel, folder: Path
) -> None:
    """Put the parts into a peft model around ``plain`` (which is used up) and let peft save it."""
    from peft import get_peft_model

    put(plain, parts.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, and tied embeddings
        wrapped = get_peft_model(plain, _config(plain, parts, trained))
        inner = wrapped.get_base_model()
        check_adapted(inner, parts.factors, "--to merged")
        with torch.no_grad():
            for name, factors in parts.factors.items():
                layer: Any = inner.get_submodule(name)
                layer.lora_A["default"].weight.data = factors.a.contiguous()
                layer.lora_B["default"].weight.data = factors.b.contiguous()
                if name in parts.biases:
                    layer.lora_B["default"].bias.data = parts.biases[name].float()
        # get_peft_model writes the name as it was given: a relative path leads nowhere elsewhere.
        about = wrapped.peft_config["default"]
        about.base_model_name_or_path = base.source
        about.revision = base.words.get("revision")
        if about.modules_to_save:  # peft has named its heads once more
            about.modules_to_save = list(dict.fromkeys(about.modules_to_save))
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    trained.setup.tokenizer.save_pretrained(folder)


def _config(plain: nn.Module, parts: LoraParts, trained: Trained) -> Any:
    """peft's configuration: one rank and a scale of 1 for all targets."""
    from peft import LoraConfig

    settings = target_settings(plain, parts.factors, getattr(trained.settings, "dropout", 0.0))
    if has_experts(plain) and parts.biases:
        raise UsageError(
            "a LoRA folder of a mixture-of-experts model cannot hold the biases of targets, which "
            "training changed",
            where="--to lora",
            fix="--to merged",
        )
    return LoraConfig(
        task_type=AUTO_CLASSES[auto_class(plain)],
        r=parts.rank,
        lora_alpha=parts.rank,
        **settings,
        lora_bias=bool(parts.biases),
        modules_to_save=list(parts.modules) or None,
        fan_in_fan_out=any(t.within(plain).transposed for t in trained.setup.targets),
    )
