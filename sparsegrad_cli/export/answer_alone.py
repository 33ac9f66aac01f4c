"""Answer chats with an exported language model by transformers and PEFT alone.

Run as a script by :mod:`sparsegrad_cli.export.check_answers`, in a process that never imports
sparsegrad. It reads a job as JSON from stdin and prints the answers as JSON on its last line.
Decoding is greedy, as in ``sparsegrad generate``; the stop tokens are those in the folder.
"""

import json
import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)


def _load(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return (model, its base, stop tokens)."""
    arguments = dict(job["arguments"])
    if job["quantization"]:
        bits: Any = BitsAndBytesConfig
        arguments["quantization_config"] = bits(**job["quantization"])
        arguments["device_map"] = {"": job["device"]}
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], **arguments)
    if not job["quantization"]:
        model = model.to(job["device"])
    if not job["adapter"]:
        return model.eval(), model, model.generation_config.eos_token_id
    from peft import PeftModel

    wrapped: Any = PeftModel.from_pretrained(model, job["folder"])
    stop = GenerationConfig.from_pretrained(job["folder"]).eos_token_id
    return wrapped.eval(), wrapped.get_base_model(), stop


@torch.no_grad()
def answer(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer every chat of a job."""
    trust = job["arguments"].get("trust_remote_code", False)
    tokenizer: Any = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=trust)
    model, base, stop = _load(job)
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    found = []
    for chat in job["chats"]:
        prompt = tokenizer.apply_chat_template(
            chat["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(job["device"])
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        base.generation_config = GenerationConfig(
            max_new_tokens=chat["limit"],
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=job["pad"],
        )
        out = model.generate(input_ids=ids, attention_mask=mask)
        new = out[0, ids.shape[1] :].tolist()
        ended = bool(new) and new[-1] in stops
        text = tokenizer.decode(
            new[:-1] if ended else new,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        found.append({"prompt": ids[0].tolist(), "ids": new, "text": text.strip(), "ended": ended})
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.load(sys.stdin))))
