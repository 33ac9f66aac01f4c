"""Train and export a mixture-of-experts model by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import TABLE, causal_or_body
from support.cli_runs import Cli
from support.small_runs import byte_tokenizer, record

pytestmark = pytest.mark.usefixtures("warm_python")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Qwen3-MoE whose first block is dense, and a chat task."""
    folder, tokenizer = tmp_path_factory.mktemp("moe"), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model_type, settings, *_ = TABLE["qwen3_moe"]
    words = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1}
    model: Any = causal_or_body(model_type, {**settings, **words}, seed=3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{n}"},
                    {"role": "assistant", "content": "ab"},
                ]
            }
            for n in range(8)
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize(
    "method",
    [
        "method={name: lora, rank: 4, dropout: 0.1}",
        pytest.param("method={name: full}", marks=pytest.mark.slow),
        pytest.param("method={name: meprop, density: 0.05}", marks=pytest.mark.slow),
        "method={name: sparsegrad, density: 0.05}",
    ],
)
def test_mixture_of_experts_is_trained_and_exported(
    cli: Cli, base: Path, tmp_path: Path, method: str
) -> None:
    made = cli(
        "train",
        f"model={base / 'model'}",
        f"task={{name: chat, path: {base / 'data'}, max_length: 48}}",
        method,
        "train={learning_rate: 1e-2, per_device_train_batch_size: 4, max_steps: 3, use_cpu: true}",
        "calibration.steps=2",
        "-o",
        "run",
    )
    assert made.code == 0, made.err
    noted = "not adapted, because no target covers them: mlp.experts.gate_up_proj (1"
    assert noted in " ".join(made.err.split())
    run = record(tmp_path / "run")
    kinds = [t["kind"] for t in run["counts"]["targets"]]
    assert kinds == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert noted in run["counts"]["note"]
    assert run["model"]["not_adapted"] == [
        {"kind": "mlp.experts.gate_up_proj", "shape": [4, 48, 32], "count": 1},
        {"kind": "mlp.experts.down_proj", "shape": [4, 32, 24], "count": 1},
    ]
    rank = () if "lora" in method or "sparsegrad" in method else ("--rank", "8")
    for to, options in (("merged", ()), ("lora", rank)):
        outcome = cli("export", "run", "--to", to, *options)
        assert outcome.code == 0, outcome.err


def test_exported_adapter_of_experts_is_on_the_dense_layers(
    cli: Cli, base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = cli(
        "train",
        f"model={base / 'model'}",
        f"task={{name: chat, path: {base / 'data'}, max_length: 48}}",
        "method={name: lora, rank: 4}",
        "train={learning_rate: 1e-2, per_device_train_batch_size: 4, max_steps: 3, use_cpu: true}",
        "-o",
        "run",
    )
    assert made.code == 0, made.err
    logits = []
    for to in ("merged", "lora", "run/adapter"):
        if to != "run/adapter":
            assert cli("export", "run", "--to", to, "-o", to).code == 0
        start = "merged" if to == "merged" else str(base / "model")
        model: Any = AutoModelForCausalLM.from_pretrained(start)
        if to != "merged":
            model = PeftModel.from_pretrained(model, str(tmp_path / to))
            trained = {n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
            assert all(".layers.0.mlp." in n and "experts" not in n for n in trained)
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(3, 15)[None]).logits)
    plain: Any = AutoModelForCausalLM.from_pretrained(base / "model")
    with torch.no_grad():
        before = plain(input_ids=torch.arange(3, 15)[None]).logits
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-5, rtol=1e-4)
    assert float((logits[0] - before).abs().max()) > 1e-3
