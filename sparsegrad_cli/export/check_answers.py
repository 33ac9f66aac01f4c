"""Compare the answers of an exported chat model with those of its run.

Logits can agree while answers differ, because of another chat template or a missing stop token.
Therefore the run answers a few prompts of its validation data. Then transformers answers them in
another process with the exported folder, its template, tokenizer and stop tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.errors import DataError, SparsegradError
from sparsegrad_cli.tasks.answerer import Answer, Answerer, ChatPrompts
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

PROMPTS = 3
_TOKENS = 24
_DEFAULT_PROMPT = (Turn("user", "Is 12 more than 7?"),)
_SCRIPT = Path(__file__).with_name("answer_alone.py")


@dataclass(frozen=True)
class Loading:
    """How another process loads an export.

    Attributes:
        folder: The export, with tokenizer and generation_config.json.
        model: The argument of ``AutoModelForCausalLM.from_pretrained``.
        arguments: Its keyword arguments, as JSON values.
        quantization: Arguments of BitsAndBytesConfig; empty if nothing is quantized.
        adapter: Whether the folder is a PEFT adapter of the model.
    """

    folder: str
    model: str
    arguments: dict[str, Any]
    quantization: dict[str, Any]
    adapter: bool


@dataclass(frozen=True)
class RunAnswer:
    """One answer of the run.

    Attributes:
        turns: The prompt.
        prompt: Its token ids.
        answer: The answer.
        logits: Before each token of the answer, (tokens, vocabulary), float32 on the CPU.
    """

    turns: Sequence[Turn]
    prompt: list[int]
    answer: Answer
    logits: Tensor


def plain_prompts(conversations: Sequence[Conversation], tokenizer: Any) -> list[Sequence[Turn]]:
    """Select prompts from a run's conversations that transformers encodes as we do.

    Conversations are excluded if they contain tools, system turns (some templates do not support
    them), or texts with control tokens (we encode them as text).
    """
    encoder = ChatPrompts(tokenizer)
    found: list[Sequence[Turn]] = []
    for conversation in conversations:
        turns = [turn for turn in conversation.turns[:-1] if turn.role != "system"]
        plain = turns and turns[-1].role == "user" and not any(turn.extra for turn in turns)
        if plain and _encoded_alike(encoder, tokenizer, turns):
            found.append(turns)
        if len(found) == PROMPTS:
            break
    return found or [_DEFAULT_PROMPT]


def _encoded_alike(encoder: ChatPrompts, tokenizer: Any, turns: Sequence[Turn]) -> bool:
    from jinja2 import TemplateError

    try:
        theirs = tokenizer.apply_chat_template(
            _messages(turns), add_generation_prompt=True, return_dict=True
        )
        return bool(theirs["input_ids"] == encoder.ids(turns))
    except (TemplateError, DataError):
        return False


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


@torch.no_grad()
def answers_of(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Turn]],
    autocast: torch.dtype | None = None,
) -> list[RunAnswer]:
    """Answer every prompt greedily; prompts without an answer are left out.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Turns that end with the user's.
        autocast: The dtype to compute in, as in training.
    """
    answerer = Answerer(model, tokenizer, GenerationSettings(max_new_tokens=_TOKENS))
    encoder = ChatPrompts(tokenizer)
    device = next(model.parameters()).device
    found = []
    for turns in prompts:
        prompt = encoder.ids(turns)
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            (answer,) = answerer.answer([turns])
            if answer.ids:
                ids = torch.tensor([[*prompt, *answer.ids]], device=device)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                rows_NV = logits[0, len(prompt) - 1 : -1].float().cpu()
                found.append(RunAnswer(turns, prompt, answer, rows_NV))
    return found


def check_answers(
    answers: Sequence[RunAnswer],
    loading: Loading,
    device: torch.device,
    pad: int | None,
    tolerance: float,
) -> dict[str, int]:
    """Answer the same prompts in another process, and compare.

    Args:
        answers: The answers of the run.
        loading: How to load the export.
        device: Where to load it.
        pad: Token id for padding.
        tolerance: Largest difference of logits that rounding explains. Where the run's logits of
            two tokens are that close, either may follow, and the rest is not compared.

    Returns:
        Four counts: ``prompts``; answers that ``stopped`` with an end of turn; ``tokens`` that are
        the same; and ``rounded``, the answers that differ because of such a rounding.

    Raises:
        SparsegradError: Text or stop differ, or the process cannot load the export.
    """
    chats = [
        {
            "messages": _messages(one.turns),
            "limit": _TOKENS if one.answer.stopped != "full" else len(one.answer.ids),
        }
        for one in answers
    ]
    job = {**vars(loading), "device": str(device), "pad": pad, "chats": chats}
    compared = [
        _compare(one, got, tolerance) for one, got in zip(answers, _answer_alone(job), strict=True)
    ]
    return {
        "prompts": len(answers),
        "stopped": sum(one.answer.stopped == "end" for one in answers),
        "tokens": sum(tokens for tokens, _ in compared),
        "rounded": sum(rounded for _, rounded in compared),
    }


def _compare(one: RunAnswer, got: dict[str, Any], tolerance: float) -> tuple[int, bool]:
    """Return how many tokens are the same, and whether rounding explains the first difference.

    Raises:
        SparsegradError: The answers differ.
    """
    if got["prompt"] != one.prompt:
        raise _difference(one, got, "its chat template renders another prompt")
    ours, theirs = list(one.answer.ids), list(got["ids"])
    shorter = min(len(ours), len(theirs))
    same = next((k for k in range(shorter) if ours[k] != theirs[k]), shorter)
    if same < shorter:
        row_V = one.logits[same]
        if float(row_V[ours[same]] - row_V[theirs[same]]) <= 2 * tolerance:
            return same, True
        raise _difference(one, got, "its answer has other tokens")
    if len(ours) != len(theirs) or got["ended"] != (one.answer.stopped == "end"):
        raise _difference(one, got, "it does not stop where the run does")
    if got["text"] != one.answer.text:
        raise _difference(one, got, "its tokenizer decodes the same tokens to another text")
    return same, False


def _answer_alone(job: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", str(_SCRIPT)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it exited with {done.returncode}"]
        raise SparsegradError(
            f"transformers cannot use the export in another process: {lines[-1]}", where="check"
        )
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _difference(one: RunAnswer, got: dict[str, Any], what: str) -> SparsegradError:
    def ends(ended: bool) -> str:
        return "and stops" if ended else "and does not stop"

    prompt = one.turns[-1].text[:60]
    ours = f"{one.answer.text[:60]!r} {ends(one.answer.stopped == 'end')}"
    return SparsegradError(
        f"the exported model does not answer as the run: {what}. To {prompt!r} the run answers "
        f"{ours}, transformers with the export answers {got['text'][:60]!r} "
        f"{ends(got['ended'])}; nothing was written",
        where="check",
        fix="if the model's own code changes its chat template or tokenizer, --to adapter leaves "
        "both with the base model",
    )
