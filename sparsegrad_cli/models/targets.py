"""Find the linear layers of MLP blocks by structure, without a list of architectures.

A transformer holds its blocks in a ``ModuleList`` of modules of one class. In a block, the MLP maps
the hidden width to another width and back. A gated MLP may compute gate and up in one layer, which
then has twice the width that the down layer reads; both are in one module. Attention and other
layers that mix tokens may have such shapes, too. They are recognized by their module: the name of
its class or attribute contains "attention" or "attn", or it holds a convolution.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import did_you_mean
from sparsegrad_cli.models.quantized import dequantized, find_quantized
from sparsegrad_cli.recipe.schema import TargetsSection, parse_slice

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Target:
    """A target module: a linear layer that a method adapts.

    Attributes:
        name: Its path in the model.
        kind: Its path in its block, such as ``intermediate.dense``.
        block: Number of its block, from 0.
        out_features: Rows of W.
        in_features: Columns of W.
        transposed: Whether the module holds W' (in, out), as GPT-2's Conv1D does.
    """

    name: str
    kind: str
    block: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def size(self) -> int:
        """Number of entries of W."""
        return self.out_features * self.in_features

    def weight_OI(self, model: nn.Module) -> Tensor:
        """Return W (out, in): a view of the parameter, or a new tensor for a quantized layer."""
        layer = model.get_submodule(self.name)
        if find_quantized(layer) is not None:
            return dequantized(layer)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight

    def in_model(self, model: nn.Module) -> Target:
        """Return the target for the plain form of a quantized model, whose layer may hold W'."""
        conv = isinstance(model.get_submodule(self.name), Conv1D)
        return replace(self, transposed=conv)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an nn.Linear (or subclass) or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer, also if its weight is packed in 4 bits."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def find_blocks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of transformer blocks, with their names.

    These are the outermost ModuleLists whose modules have one class and hold linear layers.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        same_class = len({type(block) for block in module}) == 1
        if same_class and any(is_linear(m) for m in module[0].modules()):
            found.append((name, module))
    return found


def linear_outside_blocks(model: nn.Module) -> list[str]:
    """Return the full names of the linear layers outside the blocks, such as poolers and heads."""
    inside = tuple(f"{name}." for name, _ in find_blocks(model))
    linear = (name for name, module in model.named_modules() if is_linear(module))
    return [name for name in linear if not name.startswith(inside)]


def find_targets(model: nn.Module, section: TargetsSection, where: str = "targets") -> list[Target]:
    """Return the target modules of a recipe, in model order.

    Args:
        model: The model. Its layers may have adapters of PEFT.
        section: The section ``targets`` of the recipe.
        where: The section's key, for errors.

    Raises:
        UsageError: No target was found, or a pattern or block number matches nothing. The error
            lists the layers of the model.
    """
    block_lists = find_blocks(model)
    candidates = _linear_layers_in_blocks(model, block_lists)
    if not candidates:
        raise UsageError(
            f"{type(model).__name__} has no list of blocks with linear layers in it", where=where
        )
    if section.modules == "auto":
        chosen = _mlp_layers(model, candidates)
        if not chosen:
            others = [m for m in not_adapted(model, candidates, section) if len(m.shape) > 2]
            experts = f": {', '.join(map(str, others))} are not linear layers" if others else ""
            raise UsageError(
                f"no MLP was recognised in {type(model).__name__}{experts}",
                where=f"{where}.modules",
                fix=f"name layers by pattern; there is: {_kinds(candidates)}",
            )
    else:
        chosen = _by_patterns(candidates, section.modules, where)
    return _in_blocks(chosen, section.blocks, where)


def _linear_layers_in_blocks(
    model: nn.Module, block_lists: Sequence[tuple[str, nn.ModuleList]]
) -> list[Target]:
    targets = []
    for list_name, blocks in block_lists:
        for number, block in enumerate(blocks):
            adapted: tuple[str, ...] = ()
            for inner, found in block.named_modules():
                # A layer with an adapter counts as its plain layer; the adapter's layers do not.
                module = getattr(found, "base_layer", found)
                if (inner.startswith(adapted) and adapted) or not is_linear(module):
                    continue
                if module is not found:
                    adapted = (*adapted, f"{inner}.")
                sides = linear_shape(module)
                name = f"{list_name}.{number}.{inner}"
                targets.append(Target(name, inner, number, *sides, isinstance(module, Conv1D)))
    return targets


def _mlp_layers(model: nn.Module, candidates: Sequence[Target]) -> list[Target]:
    """Return the layers of MLPs: pairs in one block that do not mix tokens."""
    by_block: dict[str, list[Target]] = {}
    for target in candidates:
        if not _mixes_tokens(model, target.name, target.kind):
            by_block.setdefault(_block_of(target), []).append(target)
    names = {
        name
        for layers in by_block.values()
        for up in layers
        for down in layers
        if _is_pair(up, down)
        for name in (up.name, down.name)
    }
    return [target for target in candidates if target.name in names]


def _block_of(target: Target) -> str:
    return target.name.removesuffix(f".{target.kind}")


def _is_pair(up: Target, down: Target) -> bool:
    """Return whether ``up`` maps the hidden width to another one, and ``down`` maps it back."""
    if up.name == down.name or up.in_features != down.out_features:
        return False
    if up.out_features == down.in_features:
        return up.out_features != up.in_features
    together = up.name.rpartition(".")[0] == down.name.rpartition(".")[0]
    return together and up.out_features == 2 * down.in_features  # Gate and up are one layer.


def _mixes_tokens(model: nn.Module, name: str, kind: str, *, attention_only: bool = False) -> bool:
    """Return whether a layer or parameter is in a module that mixes tokens.

    Args:
        model: The model.
        name: Path of the layer or parameter in the model.
        kind: Its path in its block.
        attention_only: Ignore modules with a convolution, such as Mamba's mixer.
    """
    path = name.removesuffix(f".{kind}")
    for part in kind.split(".")[:-1]:
        path = f"{path}.{part}"
        module = model.get_submodule(path)
        words = f"{part} {type(module).__name__}".lower()
        if "attn" in words or "attention" in words:
            return True
        if not attention_only and any(isinstance(m, _CONVOLUTIONS) for m in module.modules()):
            return True
    return False


@dataclass(frozen=True)
class NotAdapted:
    """Large parameters of blocks that are in no target module, such as the experts of a mixture.

    Attributes:
        kind: Path of the parameter in its block.
        shape: Shape of each parameter.
        count: Number of parameters of this kind and shape.
    """

    kind: str
    shape: tuple[int, ...]
    count: int

    @property
    def parameters(self) -> int:
        """Number of entries of all of them."""
        return self.count * math.prod(self.shape)

    def __str__(self) -> str:
        sides = " x ".join(map(str, self.shape))
        return f"{self.kind} ({self.count} of {sides}, {self.parameters:,} parameters)"


def not_adapted(
    model: nn.Module, targets: Sequence[Target], section: TargetsSection
) -> list[NotAdapted]:
    """Return the large parameters of the blocks that are in no target module.

    A parameter is large if it has at least the size of the smallest target. Attention is left out,
    because the default targets are MLP layers. Other linear layers are left out if the recipe
    selects targets by name or block.

    Returns:
        One element per kind and shape.
    """
    chosen = section.modules != "auto" or section.blocks != "all"
    smallest = min((target.size for target in targets), default=2)
    covered = {target.name for target in targets}
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for list_name, blocks in find_blocks(model):
        for number, block in enumerate(blocks):
            for inner, module in block.named_modules():
                name = f"{list_name}.{number}.{inner}"
                if name in covered or (chosen and is_linear(module)):
                    continue
                for leaf, parameter in module.named_parameters(recurse=False):
                    kind = f"{inner}.{leaf}" if inner else leaf
                    shape = tuple(parameter.shape)
                    if is_linear(module) and leaf == "weight":
                        kind, shape = inner, linear_shape(module)  # A 4-bit weight is packed.
                    large = len(shape) > 1 and math.prod(shape) >= smallest
                    path = f"{list_name}.{number}.{kind}"
                    if large and not _mixes_tokens(model, path, kind, attention_only=True):
                        found[kind, shape] += 1
    return [NotAdapted(kind, shape, count) for (kind, shape), count in found.items()]


def not_adapted_note(found: Sequence[NotAdapted], scope: str) -> str:
    """Return a note that lists the parameters in no target module; empty if there are none.

    Args:
        found: The result of :func:`not_adapted`.
        scope: The recipe's scope; with ``rest``, these parameters are trained without a method.
    """
    if not found:
        return ""
    whole = ", and trained whole by scope: rest" if scope == "rest" else ""
    return f"not adapted, because no target covers them{whole}: {', '.join(map(str, found))}"


def has_experts(model: nn.Module) -> bool:
    """Return whether the blocks hold experts as parameters of three dimensions."""
    return any(len(found.shape) > 2 for found in not_adapted(model, [], TargetsSection()))


def _by_patterns(candidates: list[Target], patterns: Sequence[str], where: str) -> list[Target]:
    chosen: dict[str, Target] = {}
    for pattern in patterns:
        matched = [
            t
            for t in candidates
            if fnmatch.fnmatchcase(t.name, pattern) or fnmatch.fnmatchcase(t.kind, pattern)
        ]
        if not matched:
            kinds = list(dict.fromkeys(t.kind for t in candidates))
            hint = did_you_mean(pattern.strip("*."), kinds)
            there = f"there is: {_kinds(candidates)}"
            raise UsageError(
                f"pattern {pattern!r} matches no linear layer",
                where=f"{where}.modules",
                fix=f"{hint} ({there})" if hint else there,
            )
        chosen.update((t.name, t) for t in matched)
    return [t for t in candidates if t.name in chosen]


def _in_blocks(targets: list[Target], blocks: str | Sequence[int], where: str) -> list[Target]:
    there = sorted({t.block for t in targets})
    if blocks == "all":
        return targets
    if isinstance(blocks, str):
        wanted = set(there[parse_slice(blocks)])
    else:
        wanted = {there[b] if -len(there) <= b < 0 else b for b in blocks}
    missing = sorted(wanted - set(there))
    if missing or not wanted:
        raise UsageError(
            f"blocks {list(blocks) if not isinstance(blocks, str) else blocks!r} "
            + (f"name {missing}, which is not there" if missing else "name none"),
            where=f"{where}.blocks",
            fix=f"blocks with targets: {there[0]} to {there[-1]}",
        )
    return [t for t in targets if t.block in wanted]


def _kinds(targets: Sequence[Target]) -> str:
    shapes = {t.kind: f"{t.kind} ({t.out_features} x {t.in_features})" for t in targets}
    return ", ".join(shapes.values())


def freeze(model: nn.Module) -> None:
    """Set ``requires_grad`` to False for all parameters of a model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the task head by name: those outside the pretrained body.

    A pooler in the body (``base_model``) belongs to the body. The output embeddings of a causal
    language model do not count as a head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if body is None or body is model:
        return {}
    inside = {id(p) for p in body.parameters()}
    tied = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(p) for p in tied.parameters()} if isinstance(tied, nn.Module) else set()
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in inside and id(p) not in excluded
    }


def pooler_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the pooler in the pretrained body by name; none without one."""
    head = head_parameters(model)
    return {
        name: p
        for name, p in model.named_parameters()
        if "pooler" in name.split(".") and name not in head
    }


def basis_keys(targets: Sequence[Target], basis_per: str) -> dict[str, str]:
    """Return the key of each target's basis by target name.

    Args:
        targets: The target modules.
        basis_per: ``layer``: the key is the target's name; else the targets of one kind share the
            key, which is the kind.
    """
    return {t.name: t.name if basis_per == "layer" else t.kind for t in targets}
