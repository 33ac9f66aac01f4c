"""The commands of the pages on other tools work as they are written there.

The tools are installed from the package index. A tiny model with the tokenizer of SmolLM2, which
llama.cpp knows, replaces the trained one.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.chat_models import smollm2_tokenizer
from support.pages import blocks
from support.paths import REPO
from support.small_runs import train
from support.tiny_models import build, config

pytestmark = pytest.mark.slow
SERVE, EVALUATE = (
    REPO / "docs" / "how-to" / name for name in ("serve.md", "evaluate-with-lm-eval.md")
)
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError")
READ_GGUF = """
import json, sys
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
field = lambda name: reader.fields[f"tokenizer.{name}"].contents()
names = [tensor.name for tensor in reader.tensors]
print(json.dumps([names, field("chat_template"), field("ggml.eos_token_id")]))
"""


def lines_of(page: Path, program: str) -> list[list[str]]:
    """Return the arguments of every command of a page that runs a program, with its name."""
    shown = "".join(text for language, text in blocks(page) if not language)
    lines = shown.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.split(" ")[0] == program]


def run(folder: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(REPO), "HF_DATASETS_CACHE": str(folder / "cache")}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
        command = (str(path / command[0]), *command[1:])
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs that the pages' ``pip install`` adds to the packages of the tests."""
    folder = tmp_path_factory.mktemp("tools") / "venv"
    venv.create(folder, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    others = [place for place in sys.path if Path(place).name == "site-packages"]
    (packages / "tests.pth").write_text("\n".join(others))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder))
    for page in (SERVE, EVALUATE):
        for _, *arguments in lines_of(page, "pip"):
            ended = run(folder, *pip, *arguments)
            if ended.returncode and any(word in ended.stderr for word in OFFLINE):
                pytest.skip("the package index cannot be reached")
            assert ended.returncode == 0, ended.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the run and its merged export, which both pages begin with."""
    from transformers import AutoModelForCausalLM

    place, tokenizer = tmp_path_factory.mktemp("chat"), smollm2_tokenizer()
    shape = config("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model: Any = build(AutoModelForCausalLM, shape, 3)
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"{n + 1}"} for n in range(20)]
    data = place / "talk.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    short = ("task.max_length=64", "task.validation_fraction=0.25", "train.max_steps=2")
    train(place / "runs" / "chat", place / "base", data, "method=lora", *short)
    export = lines_of(SERVE, "sparsegrad")[0]
    assert export in lines_of(EVALUATE, "sparsegrad")
    ended = run(place, sys.executable, "-m", "sparsegrad_cli", *export[1:])
    assert ended.returncode == 0, ended.stderr
    return place


def test_llama_cpp_converts_a_merged_export(folder: Path, programs: Path) -> None:
    """The file has every tensor, the chat template, and the token that ends a turn."""
    (command,) = lines_of(SERVE, "convert-hf-to-gguf")
    ended = run(folder, *command, path=programs)
    assert ended.returncode == 0, ended.stderr
    read = run(folder, "python", "-c", READ_GGUF, command[3], path=programs)
    assert read.returncode == 0, read.stderr
    names, template, end = json.loads(read.stdout)
    merged = folder / "runs" / "chat" / "export-merged"
    with safe_open(merged / "model.safetensors", "pt") as tensors:
        assert len(set(names)) == len(list(tensors.keys()))
    tokenizer = smollm2_tokenizer()
    assert template == tokenizer.chat_template
    assert end == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_lm_eval_scores_a_merged_export_on_a_task_of_your_own(folder: Path, programs: Path) -> None:
    """The accuracy is that of the answers with the highest log-likelihood."""
    shown = dict(blocks(EVALUATE))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "capitals.yaml").write_text(shown["yaml"], encoding="utf-8")
    (folder / "tasks" / "capitals.jsonl").write_text(shown["json"], encoding="utf-8")
    (command,) = (line for line in lines_of(EVALUATE, "lm_eval") if "capitals" in line)
    ended = run(folder, *command, path=programs)
    assert ended.returncode == 0, ended.stderr
    (results,) = (folder / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["capitals"]["acc,none"]
    rows = [json.loads(line) for line in shown["json"].splitlines()]
    answers = [likeliest(folder / "runs" / "chat" / "export-merged", row) for row in rows]
    right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    assert found == sum(right) / len(right)


def likeliest(merged: Path, row: dict[str, Any]) -> int:
    """Return the choice with the largest sum of log-probabilities after the question."""
    from transformers import AutoModelForCausalLM

    tokenizer = smollm2_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    start = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    sums = []
    for choice in row["choices"]:
        more = tokenizer(f" {choice}")["input_ids"]
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*start, *more]])).logits[0].double()
        logs_TV = logits_TV.log_softmax(-1)[len(start) - 1 : -1]
        sums.append(float(logs_TV.gather(1, torch.tensor(more)[:, None]).sum()))
    return max(range(len(sums)), key=sums.__getitem__)
