"""JSON of records that anybody may have written. Imports nothing."""

from __future__ import annotations

import json
from typing import Any

MOST_DEPTH = 100  # a record of ours is eight deep


def plain_json(content: str | bytes) -> Any:
    """``json.loads``, with None for NaN and the infinities, which JSON has no words for.

    Raises:
        ValueError: no JSON, a number of thousands of digits, or nested too deeply for what walks
            through it later.
    """
    try:
        found = json.loads(content, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    level: list[Any] = [[found]]
    depth = 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for many in inner for each in many if isinstance(each, dict | list)]
        depth += 1
    return found
