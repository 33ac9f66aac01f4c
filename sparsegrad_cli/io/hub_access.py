"""Find out in one request whether the Hugging Face hub answers. Imports nothing heavy."""

from __future__ import annotations

import time
from typing import Literal

from sparsegrad_cli.error_mapping import first_line

_SECONDS = 60  # that an answer holds
_answers: dict[tuple[str, str], tuple[float, str | None]] = {}


def why_unreachable(kind: Literal["model", "dataset"], hub_id: str) -> str | None:
    """Return None when the hub answers, else the reason in words.

    One request of at most ten seconds, whose answer holds for a minute: the libraries themselves
    try for about a minute before they turn to their cache.
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
            return None  # it answered, if with an error: the library says what to make of that
        if "offline mode" in str(error):
            return "HF_HUB_OFFLINE is set"
        return first_line(error)
    return None
