"""Does an exported chat model say what its run says? By transformers, in a process of its own.

Logits can agree where answers do not: another chat template, or no stop token. So the run answers a
few prompts of its validation data, and the export answers them as it does for anyone: the template,
the tokenizer and the stop tokens are those in its folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.errors import DataError, SparsegradError
from sparsegrad_cli.generate.answerer import Answer, Answerer
from sparsegrad_cli.generate.options import GenerationSettings
from sparsegrad_cli.generate.prompting import ChatPrompts

PROMPTS = 3
_TOKENS = 24
_ASKED = (Turn("user", "Is 12 more than 7?"),)  # where the data holds nothing that is plain

# Greedy, as `sparsegrad generate` is; only the stop tokens are the folder's.
_PROGRAM = """\
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
job = json.load(sys.stdin)
trust = {"trust_remote_code": job["words"].get("trust_remote_code", False)}
tokenizer = AutoTokenizer.from_pretrained(job["folder"], **trust)
words = dict(job["words"])
if job["quantization"]:
    words["quantization_config"] = BitsAndBytesConfig(**job["quantization"])
    words["device_map"] = {"": job["device"]}
model = AutoModelForCausalLM.from_pretrained(job["model"], **words)
if not job["quantization"]:
    model = model.to(job["device"])
stop = GenerationConfig.from_pretrained(job["folder"]).eos_token_id
if job["adapter"]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, job["folder"])
    base = model.get_base_model()
else:
    base, stop = model, model.generation_config.eos_token_id
model.eval()
stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
found = []
for chat in job["chats"]:
    asked = tokenizer.apply_chat_template(
        chat["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(job["device"])
    ids, mask = asked["input_ids"], asked["attention_mask"]
    base.generation_config = GenerationConfig(
        max_new_tokens=chat["limit"], do_sample=False, eos_token_id=stop, pad_token_id=job["pad"]
    )
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask)
    new = out[0, ids.shape[1]:].tolist()
    ended = bool(new) and new[-1] in stops
    text = tokenizer.decode(
        new[:-1] if ended else new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    found.append({"prompt": ids[0].tolist(), "ids": new, "text": text.strip(), "ended": ended})
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True)
class Loading:
    """How a fresh process loads an export.

    Attributes:
        folder: of the export: its tokenizer and generation_config.json, perhaps its model.
        model: what ``AutoModelForCausalLM.from_pretrained`` is given.
        words: its arguments, as JSON has them.
        quantization: arguments of BitsAndBytesConfig; empty where nothing is quantized.
        adapter: the folder is peft's, and goes onto the model.
    """

    folder: str
    model: str
    words: dict[str, Any]
    quantization: dict[str, Any]
    adapter: bool


@dataclass(frozen=True)
class Said:
    """One answer of the run.

    Attributes:
        turns: the prompt.
        prompt: its token ids.
        answer: to it.
        logits: before each token of the answer, (tokens, vocabulary), float32 on the CPU.
    """

    turns: Sequence[Turn]
    prompt: list[int]
    answer: Answer
    logits: Tensor


def plain_prompts(conversations: Sequence[Conversation], tokenizer: Any) -> list[Sequence[Turn]]:
    """Prompts that anyone can ask without our help, from the conversations of a run.

    Left out are system turns, which a template may not take, tools, and what transformers writes in
    other tokens than we do: control tokens that somebody typed are text to us.
    """
    encoder = ChatPrompts(tokenizer)
    found: list[Sequence[Turn]] = []
    for conversation in conversations:
        turns = [turn for turn in conversation.turns[:-1] if turn.role != "system"]
        asked = turns and turns[-1].role == "user" and not any(turn.extra for turn in turns)
        if asked and _alike(encoder, tokenizer, turns):
            found.append(turns)
        if len(found) == PROMPTS:
            break
    return found or [_ASKED]


def _alike(encoder: ChatPrompts, tokenizer: Any, turns: Sequence[Turn]) -> bool:
    from jinja2 import TemplateError

    try:
        plain = tokenizer.apply_chat_template(
            _messages(turns), add_generation_prompt=True, return_dict=True
        )
        return bool(plain["input_ids"] == encoder.ids(turns))
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
) -> list[Said]:
    """What a model says to each prompt, greedily.

    Args:
        autocast: compute in this dtype, as training did.
    """
    before = model.generation_config
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
                found.append(Said(turns, prompt, answer, rows_NV))
    model.generation_config = before
    return found


def check_answers(
    said: Sequence[Said], loading: Loading, device: torch.device, pad: int | None, tolerance: float
) -> dict[str, int]:
    """Let a fresh process answer the same prompts, and compare.

    Args:
        said: by the run.
        loading: how the export is loaded.
        pad: token id for padding.
        tolerance: largest difference of logits that rounding explains. Where the run itself holds
            two tokens that close, either may follow, and the rest of that answer is not compared.

    Returns:
        ``prompts``, how many ``stopped`` at an end of turn, ``tokens`` that are the same, and
        ``rounded``: answers that rounding let part ways.

    Raises:
        SparsegradError: text or stop differ, or the process cannot load the export.
    """
    chats = [
        {
            "messages": _messages(one.turns),
            "limit": _TOKENS if one.answer.stopped != "full" else len(one.answer.ids),
        }
        for one in said
    ]
    job = {**vars(loading), "device": str(device), "pad": pad, "chats": chats}
    same = rounded = 0
    for one, got in zip(said, _fresh_process(job), strict=True):
        if got["prompt"] != one.prompt:
            raise _differs(one, got, "the chat template in its folder writes another prompt")
        mine, its = list(one.answer.ids), list(got["ids"])
        together = next(
            (k for k, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b),
            min(len(mine), len(its)),
        )
        same += together
        if together < min(len(mine), len(its)):
            row_V = one.logits[together]
            if float(row_V[mine[together]] - row_V[its[together]]) <= 2 * tolerance:
                rounded += 1
                continue
            raise _differs(one, got, "its answer is another")
        if len(mine) != len(its) or got["ended"] != (one.answer.stopped == "end"):
            raise _differs(one, got, "it does not stop where the run does")
        if got["text"] != one.answer.text:
            raise _differs(one, got, "the tokenizer in its folder reads the same tokens otherwise")
    stopped = sum(one.answer.stopped == "end" for one in said)
    return {"prompts": len(said), "stopped": stopped, "tokens": same, "rounded": rounded}


def _fresh_process(job: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise SparsegradError(
            f"what was written cannot be used by transformers in a process of its own: {lines[-1]}",
            where="check",
        )
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _differs(said: Said, got: dict[str, Any], what: str) -> SparsegradError:
    def ends(ended: bool) -> str:
        return "and stops" if ended else "and does not stop"

    asked = said.turns[-1].text[:60]
    mine = f"{said.answer.text[:60]!r} {ends(said.answer.stopped == 'end')}"
    return SparsegradError(
        f"the exported model does not answer as the run: {what}. Asked {asked!r}, the run says "
        f"{mine}, transformers with the export says {got['text'][:60]!r} {ends(got['ended'])}; "
        "nothing was written",
        where="check",
        fix="is the model's own chat template or tokenizer changed by its code? --to adapter keeps "
        "both with the base model",
    )
