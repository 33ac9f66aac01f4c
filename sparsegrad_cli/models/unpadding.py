"""Compute an encoder's hidden states for the real tokens of a batch only.

A batch of texts is padded to its longest row. Often half of its tokens are padding, which the model
computes although nothing reads it. After :func:`use_unpadding` the hidden states of the blocks have
the shape (1, real tokens, hidden), from the embeddings on; rows exist in attention alone
(numerics/row_attention.py). If the task's head reads the first token of each row and nothing else,
the last block is computed for those tokens: the others only give it keys and values.

The logits, the loss and the gradients are those of the padded model up to rounding. With dropout,
they agree in distribution: masks are drawn for real tokens only.

A table names the parts of each family of models (models/encoder_families.py). A model is changed
only if a small batch then gives the logits that it gave before, so a model of another
structure is computed with padding, and the reason is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.encoder_families import FAMILIES, Family, Parts
from sparsegrad_cli.models.module_trace import evaluating
from sparsegrad_cli.models.token_rows import Rows, rows_of, sorted_rows
from sparsegrad_cli.numerics import row_attention as attention
from sparsegrad_cli.numerics.dropout import CheapDropout, dropout_add_norm
from sparsegrad_cli.numerics.saved_activations import after_activation

# Arguments of an encoder that may be given; others change what it computes.
_ARGUMENTS = {"token_type_ids", "return_dict", "num_items_in_batch"}
_MORE_OUTPUTS = ("output_hidden_states", "output_attentions")  # Settings of a configuration.
_SHORT = (7, 4, 5)  # Tokens of the rows that a model is tried on.


@dataclass
class TokenCounts:
    """Tokens of the batches that an encoder has seen.

    Attributes:
        real: tokens of the texts, in all batches.
        padded: tokens of the batches with their padding.
        computed: tokens whose hidden states the blocks computed, summed over blocks.
        batches, padded_batches: number of batches, and of those computed with their padding.
    """

    real: int = 0
    padded: int = 0
    computed: int = 0
    batches: int = 0
    padded_batches: int = 0


class Unpadding:
    """How an encoder computes real tokens only. See :func:`use_unpadding`.

    Attributes:
        encoder: the encoder, which was changed.
        first_only: whether the last block is computed for the first token of each row only.
        active: whether batches are computed without padding.
        training, evaluation: counts of tokens in the two modes.
        lengths: tokens of the rows of the next batches, which a batch without values cannot say;
            one with fewer rows takes the first. None to read the masks.
    """

    def __init__(self, encoder: Any, family: Family) -> None:
        self.encoder, self.family = encoder, family
        self.first_only, self.active = False, True
        self.training, self.evaluation = TokenCounts(), TokenCounts()
        self.lengths: Sequence[int] | None = None
        self.parts = Parts(family, encoder.config)
        self.plain = encoder.forward

    @property
    def blocks(self) -> Sequence[Any]:
        """The encoder's blocks."""
        found: Sequence[Any] = attrgetter(self.family.layers)(self.encoder)
        return found

    @contextmanager
    def turned_off(self) -> Iterator[None]:
        """Compute padding too while the context lasts."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *others: Any,
        **more: Any,
    ) -> Any:
        """Run the encoder on the real tokens of a batch, or as it was where that is impossible."""
        given = {name for name, value in more.items() if value is not None and value is not False}
        usual = not others and given <= _ARGUMENTS and more.get("return_dict") is not False
        wanted = (getattr(self.encoder.config, name, False) for name in _MORE_OUTPUTS)
        usual = usual and not any(wanted)
        rows = None
        if self.active and usual and input_ids is not None:
            rows = self._rows(input_ids, attention_mask)
        if input_ids is not None:
            self._count(input_ids, attention_mask, rows)
        if rows is None or input_ids is None:
            return self.plain(input_ids, attention_mask, *others, **more)
        return self._on_real_tokens(input_ids, more.get("token_type_ids"), rows)

    def _rows(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Rows | None:
        """Return where the real tokens of a batch lie; None if it needs its padding."""
        if mask_BL is None:
            mask_BL = torch.ones_like(ids_BL)
        if mask_BL.shape != ids_BL.shape:
            return None
        if self.lengths is not None:
            mask_BL.count_nonzero()  # An estimate counts the batch's tensors as they are read.
            lengths = self.lengths[: len(ids_BL)]
            return sorted_rows([0] * len(lengths), lengths, ids_BL.shape[1], ids_BL.device)
        # A head that reads the first column reads padding where a row begins with it.
        if self.first_only and not bool(mask_BL[:, 0].all()):
            return None
        return rows_of(mask_BL)

    def _count(self, ids_BL: Tensor, mask_BL: Tensor | None, rows: Rows | None) -> None:
        counts = self.training if self.encoder.training else self.evaluation
        counts.batches += 1
        counts.padded += ids_BL.numel()
        if rows is None:
            real = ids_BL.numel() if mask_BL is None else int((mask_BL != 0).sum())
            counts.padded_batches += 1
            counts.computed += ids_BL.numel() * len(self.blocks)
        else:
            real = len(rows.places)
        counts.real += real

    def _on_real_tokens(self, ids_BL: Tensor, types_BL: Tensor | None, rows: Rows) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        encoder = self.encoder
        counts = self.training if encoder.training else self.evaluation
        inputs = {
            "input_ids": ids_BL.flatten()[rows.places][None],
            "position_ids": _positions(encoder.embeddings, ids_BL, rows),
        }
        if types_BL is not None:
            inputs["token_type_ids"] = types_BL.flatten()[rows.places][None]
        hidden_1TI = encoder.embeddings(**inputs)
        if hasattr(encoder, "embeddings_project"):
            hidden_1TI = encoder.embeddings_project(hidden_1TI)
        bias_HLL = None
        if self.family.relative:
            longest = hidden_1TI.new_empty(1, rows.groups[0].length, 0)
            bias_HLL = encoder.encoder.compute_position_bias(longest)[0]
        blocks = self.blocks
        for number, block in enumerate(blocks, start=1):
            first = self.first_only and number == len(blocks)
            hidden_1TI = block(hidden_1TI, rows=rows, bias_HLL=bias_HLL, first_only=first)
            counts.computed += hidden_1TI.shape[1]
        hidden = _by_row(hidden_1TI, rows, self.first_only)
        pooler = getattr(encoder, "pooler", None)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden)
        )


def _positions(embeddings: Any, ids_BL: Tensor, rows: Rows) -> Tensor:
    """Return the position ids of the real tokens, (1, T), as the model counts them."""
    padding = getattr(embeddings, "padding_idx", None)
    if padding is None:
        return (rows.places % rows.shape[1])[None]
    # RoBERTa and its kin count the tokens that are not padding, from the padding's id on.
    real_BL = (ids_BL != padding).to(torch.int64)
    positions_BL: Tensor = torch.cumsum(real_BL, 1) * real_BL + padding
    return positions_BL.flatten()[rows.places][None]


def _by_row(hidden_1TI: Tensor, rows: Rows, first_only: bool) -> Tensor:
    """Return the hidden states by row: (B, 1, hidden) of the first tokens, or (B, L, hidden)."""
    if first_only:
        return hidden_1TI[0].index_select(0, rows.ranks)[:, None]
    flat = hidden_1TI.new_zeros(rows.shape[0] * rows.shape[1], hidden_1TI.shape[-1])
    return flat.index_copy(0, rows.places, hidden_1TI[0]).view(*rows.shape, -1)


def _block_forward(
    block: nn.Module,
    parts: Parts,
    plain: Callable[..., Any],
    hidden: Tensor,
    *positional: Any,
    rows: Rows | None = None,
    bias_HLL: Tensor | None = None,
    first_only: bool = False,
    **more: Any,
) -> Any:
    """Run a block on the real tokens: (1, T, hidden) -> (1, T, hidden).

    With ``first_only`` the result is (1, B, hidden), the first tokens of the sorted rows.
    """
    if rows is None:
        return plain(hidden, *positional, **more)
    compute = functools.partial(
        _on_rows, block, parts, rows=rows, bias_HLL=bias_HLL, first_only=first_only
    )
    # transformers recomputes a block by its class's forward, which stands aside here.
    if getattr(block, "gradient_checkpointing", False) and block.training:
        return checkpoint(compute, hidden, use_reentrant=False)
    return compute(hidden)


def _on_rows(
    block: nn.Module,
    parts: Parts,
    hidden: Tensor,
    *,
    rows: Rows,
    bias_HLL: Tensor | None,
    first_only: bool,
) -> Tensor:
    """Compute a block on (1, T, hidden); see :func:`_block_forward`."""
    p = parts.of(block)
    query_states = hidden.index_select(1, rows.starts) if first_only else hidden
    q, k, v = (
        x.view(x.shape[1], parts.heads, -1) for x in (p.q(query_states), p.k(hidden), p.v(hidden))
    )
    dropout = p.attention_dropout.p if p.attention_dropout.training else 0.0
    attend = attention.row_attention if attention.on_cpu(q) else attention.padded_attention
    attended = attend(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        rows.groups,
        scale=q.shape[-1] ** -0.5,
        dropout=dropout,
        bias_HLL=bias_HLL,
        first_only=first_only,
    )
    middle = _add_norm(p.norm1, p.drop1, p.o(attended.flatten(1)[None]), query_states)
    return _add_norm(p.norm2, p.drop2, _mlp(block, p, middle), middle)


def _mlp(block: nn.Module, p: SimpleNamespace, x: Tensor) -> Tensor:
    """Return down(act(up(x))), recomputed as the recipe says."""

    def widened(x: Tensor) -> Tensor:
        wide: Tensor = p.act(p.up(x))
        return wide

    out: Tensor
    # The module around the layers, whose forward does not run here, says what is recomputed.
    if getattr(vars(p.mlp).get("forward"), "func", None) is checkpoint:
        if any(module is p.down for module in p.mlp.children()):
            out = checkpoint(lambda x: p.down(widened(x)), x, use_reentrant=False)
        else:
            out = p.down(checkpoint(widened, x, use_reentrant=False))
    elif getattr(block, "gradient_checkpointing", False):
        out = p.down(widened(x))  # Nothing is saved, and hooks would keep what they see.
    else:
        out = after_activation(p.down, p.act, p.up(x))
    return out


def _add_norm(norm: nn.Module, drop: nn.Module | None, x: Tensor, residual: Tensor) -> Tensor:
    """Return norm(drop(x) + residual)."""
    if type(norm) is nn.LayerNorm and norm.weight is not None and attention.on_cpu(x):
        dropout = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return dropout_add_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout)
    out: Tensor = norm((x if drop is None else drop(x)) + residual)
    return out


# --- switch on


def use_unpadding(model: nn.Module) -> Unpadding:
    """Let a model's encoder compute the real tokens of its batches only.

    The model may be a transformers model or one that PEFT has wrapped, before or after adapters are
    added. Its parameters and their names stay. It is run on a batch of three short texts to see
    that it gives the logits that it gave before, and what its head reads. A batch that needs its
    padding, such as one padded on the left for a head that reads the first column, is computed
    with it, and counted.

    Args:
        model: changed in place.

    Returns:
        The counts of tokens, and the way to turn it off.

    Raises:
        UsageError: the model has no encoder that can be computed without padding.
    """
    found = _find_encoder(model)
    if isinstance(found, Unpadding):
        return found
    unpadding = Unpadding(*found)
    changed = (unpadding.encoder, *unpadding.blocks)
    own = {module: vars(module)["forward"] for module in changed if "forward" in vars(module)}
    try:
        with torch.no_grad(), evaluating(model):
            same = _gives_same_outputs(model, unpadding)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        same = False  # It needs other inputs, or has more parts than the family.
    unpadding.evaluation = TokenCounts()
    if not same:
        _uninstall(unpadding, own)
        raise UsageError(
            f"{type(unpadding.encoder).__name__} cannot be computed without padding, so its "
            "batches are computed with it"
        )
    _use_cheap_dropout(unpadding.encoder.embeddings)
    return unpadding


def _gives_same_outputs(model: nn.Module, unpadding: Unpadding) -> bool:
    """Install it, and return whether the model gives the outputs that it gave before."""
    inputs = _short_batch(unpadding.encoder)
    before = _outputs(model, inputs)
    first_only = _reads_first_only(model, unpadding, inputs)
    _install(unpadding)
    unpadding.first_only, unpadding.lengths = first_only, _SHORT
    after = _outputs(model, inputs)
    unpadding.lengths = None
    return _close(before, after, inputs["attention_mask"])


@contextmanager
def with_padding(model: nn.Module) -> Iterator[None]:
    """Compute padding too while the context lasts: for code that reads hidden states by row."""
    installed = next(filter(None, map(_installed_in, model.modules())), None)
    with nullcontext() if installed is None else installed.turned_off():
        yield


def _installed_in(module: nn.Module) -> Unpadding | None:
    """Return what :func:`use_unpadding` made of a module; None if it is not the encoder."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    return owner if isinstance(owner, Unpadding) else None


def _find_encoder(model: nn.Module) -> tuple[Any, Family] | Unpadding:
    """Return the encoder and its family, or what was installed before."""
    for module in model.modules():
        if (installed := _installed_in(module)) is not None:
            return installed
        config: Any = getattr(module, "config", None)
        if not hasattr(module, "embeddings") or getattr(config, "is_decoder", False):
            continue
        for family in FAMILIES:
            try:
                parts = Parts(family, config)
                for block in attrgetter(family.layers)(module):
                    parts.of(block)
            except AttributeError:
                continue
            if not hasattr(module, "_hf_hook"):
                return module, family
    raise UsageError(
        f"{type(model).__name__} has no encoder whose structure is known, so its batches are "
        "computed with their padding"
    )


def _install(unpadding: Unpadding) -> None:
    # Set on the instances: a change on the classes would reach other models.
    for block in unpadding.blocks:
        block.forward = functools.partial(_block_forward, block, unpadding.parts, block.forward)
    unpadding.encoder.forward = unpadding.forward


def _uninstall(unpadding: Unpadding, own: Mapping[nn.Module, Any]) -> None:
    """Give modules their own forward again, or that of their class if they had none."""
    for module in (unpadding.encoder, *unpadding.blocks):
        vars(module).pop("forward", None)
        if module in own:
            module.forward = own[module]


def _use_cheap_dropout(embeddings: nn.Module) -> None:
    for name, module in list(embeddings.named_modules()):
        if isinstance(module, nn.Dropout):
            cheap = CheapDropout(module.p)
            cheap.training = module.training
            embeddings.set_submodule(name, cheap)


def _short_batch(encoder: Any) -> dict[str, Tensor]:
    """Return rows of ``_SHORT`` tokens, padded on the right."""
    table = encoder.get_input_embeddings()
    size, width = len(_SHORT), max(_SHORT)
    ids_BL = torch.arange(size * width).view(size, width) * 7 % table.num_embeddings
    padding = getattr(encoder.config, "pad_token_id", None)
    ids_BL[ids_BL == (padding or 0)] += 1
    mask_BL = torch.arange(width) < torch.tensor(_SHORT)[:, None]
    ids_BL = ids_BL.masked_fill(~mask_BL, padding or 0)
    device = table.weight.device
    return {"input_ids": ids_BL.to(device), "attention_mask": mask_BL.long().to(device)}


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a model, or the hidden states of an encoder alone."""
    output = model(**inputs)
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


def _reads_first_only(model: nn.Module, unpadding: Unpadding, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether the outputs depend on the first token of each row of the last block alone.

    The others become NaN, which would reach the outputs.
    """

    def spoil(block: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        hidden[:, 1:] = float("nan")
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = unpadding.blocks[-1].register_forward_hook(spoil)
    try:
        return bool(torch.isfinite(_outputs(model, inputs)).all())
    finally:
        hook.remove()


def _close(before: Tensor, after: Tensor, mask_BL: Tensor) -> bool:
    """Return whether outputs agree up to rounding, at the real tokens if they are by token."""
    if before.shape != after.shape:
        return False
    difference = (before.float() - after.float()).abs()
    if before.shape[:2] == mask_BL.shape and before.ndim == 3:
        difference = difference * mask_BL[..., None]
    limit = 1e-4 if before.dtype == torch.float32 else 0.05
    return bool(difference.max() <= limit * max(1.0, float(before.abs().max())))
