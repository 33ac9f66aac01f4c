"""How families of encoders name the parts of their blocks, written for transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """How a family of encoders names its parts: paths of attributes.

    A block is y = norm1(x + drop1(o(attention(q(x), k(x), v(x))))), and then
    norm2(y + drop2(down(act(up(y))))).

    Attributes:
        layers: of the encoder, to its blocks.
        q, k, v, o, attention_dropout, norm1, drop1, up, act, down, norm2, drop2: of a block. None
            for a dropout that the family does not have.
        heads: of the configuration, to the number of heads.
        relative: whether scores have a bias by relative position, as in MPNet.
    """

    layers: str
    q: str
    k: str
    v: str
    o: str
    attention_dropout: str
    norm1: str
    drop1: str | None
    up: str
    act: str
    down: str
    norm2: str
    drop2: str
    heads: str = "num_attention_heads"
    relative: bool = False


_BERT = Family(
    layers="encoder.layer",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    attention_dropout="attention.self.dropout",
    norm1="attention.output.LayerNorm",
    drop1="attention.output.dropout",
    up="intermediate.dense",
    act="intermediate.intermediate_act_fn",
    down="output.dense",
    norm2="output.LayerNorm",
    drop2="output.dropout",
)
_MPNET = Family(
    layers="encoder.layer",
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    o="attention.attn.o",
    attention_dropout="attention.attn.dropout",
    norm1="attention.LayerNorm",
    drop1="attention.dropout",
    up="intermediate.dense",
    act="intermediate.intermediate_act_fn",
    down="output.dense",
    norm2="output.LayerNorm",
    drop2="output.dropout",
    relative=True,
)
_DISTILBERT = Family(
    layers="transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    attention_dropout="attention.dropout",
    norm1="sa_layer_norm",
    drop1=None,
    up="ffn.lin1",
    act="ffn.activation",
    down="ffn.lin2",
    norm2="output_layer_norm",
    drop2="ffn.dropout",
    heads="n_heads",
)
FAMILIES = (_BERT, _MPNET, _DISTILBERT)


class Parts:
    """The parts of a block, looked up at every pass because methods replace them."""

    def __init__(self, family: Family, config: Any) -> None:
        names = ("q", "k", "v", "o", "norm1", "up", "act", "down", "norm2", "attention_dropout")
        self._get: dict[str, Callable[[Any], Any]] = {
            name: attrgetter(getattr(family, name)) for name in names
        }
        for name in ("drop1", "drop2"):
            path = getattr(family, name)
            self._get[name] = attrgetter(path) if path else lambda block: None
        self._get["mlp"] = attrgetter(family.up.rpartition(".")[0])
        self.heads = int(getattr(config, family.heads))

    def of(self, block: nn.Module) -> SimpleNamespace:
        """Return the parts of a block by their names in :class:`Family`, and ``mlp`` around up.

        Raises:
            AttributeError: the block has another structure.
        """
        return SimpleNamespace(**{name: get(block) for name, get in self._get.items()})
