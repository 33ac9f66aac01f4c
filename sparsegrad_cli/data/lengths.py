"""How many tokens of an example a model has positions for."""

from __future__ import annotations

from typing import Any


def fitting_length(wanted: int, config: Any) -> tuple[int, str | None]:
    """``wanted``, or less where the model has fewer positions, and then a note."""
    positions = getattr(config, "max_position_embeddings", None)
    kind = getattr(config, "model_type", "")
    offset = 2 if kind in ("roberta", "xlm-roberta", "camembert") else 0
    if isinstance(positions, int) and positions > 0 and wanted > positions - offset:
        room = positions - offset
        return room, f"max_length {wanted} cut to the model's {room} positions"
    return wanted, None
