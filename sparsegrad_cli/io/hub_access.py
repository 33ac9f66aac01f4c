"""Find out in one request whether the Hugging Face hub answers. Imports nothing heavy."""

from __future__ import annotations

import time
from typing import Literal

from sparsegrad_cli.error_mapping import first_line

_SECONDS = 60  # An answer is kept for this long.
_answers: dict[tuple[str, str], tuple[float, str | None]] = {}


def why_unreachable(kind: Literal["model", "dataset"], hub_id: str) -> str | None:
    """Return None if the hub answers, else the reason.

    This makes one request of at most ten seconds and keeps the answer for a minute. The libraries
    themselves try for about a minute before they use their cache.
    """
    asked, answer = _answers.get((kind, hub_id), (-float("inf"), None))
    if time.monotonic() - asked > _SECONDS:
        answer = _ask(kind, hub_id)
        _answers[kind, hub_id] = (time.monotonic(), answer)
    return answer


def _ask(kind: Literal["model", "dataset"], hub_id: str) -> str | None:
    import huggingface_hub

    ask = huggingface_hub.model_info if kind == "model" else huggingface_hub.dataset_info
    try:
        ask(hub_id, timeout=10)
    except Exception as error:
        if getattr(error, "response", None) is not None:
            return None  # The hub has answered. The library reports its error.
        if "offline mode" in str(error):
            return "HF_HUB_OFFLINE is set"
        return first_line(error)
    return None
