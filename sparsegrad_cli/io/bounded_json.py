"""Parse JSON that may come from anyone, with a limit on its depth."""

from __future__ import annotations

import json
from typing import Any

MOST_DEPTH = 100  # Our records are eight levels deep.


def plain_json(content: str | bytes) -> Any:
    """Parse JSON; NaN and the infinities, which JSON does not have, become None.

    Raises:
        ValueError: The content is not JSON, has a number of thousands of digits, or is nested more
            than 100 levels deep.
    """
    try:
        found = json.loads(content, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep") from None
    level: list[Any] = [[found]]
    depth = 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for many in children for each in many if isinstance(each, dict | list)]
        depth += 1
    return found
