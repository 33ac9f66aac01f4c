"""Quantized language models: runs, exports and packed folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.chat_models import chat_model_folder, chat_turns, load
from support.cli_runs import Cli
from support.quantized_models import BITS, need_bitsandbytes
from support.small_runs import train
from torch import Tensor

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models.digests import weights_digest
from sparsegrad_cli.models.quantized import dequantized, quantization_state, quantized_layers
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

need_bitsandbytes()
pytestmark = pytest.mark.usefixtures("warm_python")
QUESTIONS = ("Is 12 more?", "And 7?", "Who came home?", "What was old?")
ANSWERS = ("It is, by 5.", "No.", "The ship.")
METHODS = {
    "core": ("method.rank=8", "calibration.source=token"),
    "lora": ("method=lora", "method.rank=3"),
}
HALF = ("model.dtype=bfloat16", "train.bf16=true")
Loaded = tuple[Any, Any, dict[str, Any]]
Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``trained("core", "4bit", *overrides)``: a run of a chat task, made once."""
    place = tmp_path_factory.mktemp("packed")
    # Rows of whole blocks of scales: bitsandbytes' own CPU kernel is right for these alone.
    chat_model_folder(place / "base", positions=96, hidden_size=64, intermediate_size=128)
    rows = [{"prompt": f"{n}. {QUESTIONS[n % 4]}", "completion": ANSWERS[n % 3]} for n in range(32)]
    data = place / "talk.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = ("task.max_length=64", "task.validation_fraction=0.2", "train.learning_rate=2e-2")

    def run(name: str, bits: str, *more: str) -> Path:
        folder = place / f"{name}-{bits}-{len(more)}"
        if not folder.is_dir():
            asked = (f"model.quantization={bits}", *limits, *METHODS[name], *more)
            train(folder, place / "base", data, *asked)
        return folder

    return run


def answers(loaded: Loaded) -> list[str]:
    answerer = Answerer(*loaded[:2], GenerationSettings(max_new_tokens=12))
    return [a.text for a in answerer.answer([chat_turns(q) for q in QUESTIONS])]


@torch.no_grad()
def logits(loaded: Loaded) -> Tensor:
    ids = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(1))
    found: Tensor = loaded[0](ids).logits
    return found.float()


def export(cli: Cli, run: Path, form: str) -> dict[str, Any]:
    made = cli("export", str(run), "--to", form, "-o", form, "--json", "-q")
    assert made.code == 0, made.err
    found: dict[str, Any] = json.loads(made.out)
    return found


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_and_all_its_exports_give_the_same_answers(
    name: str, bits: str, cli: Cli, trained: Trained
) -> None:
    run = trained(name, bits)
    loss = json.loads((run / "run.json").read_text())["metrics"]
    assert loss["final"]["loss"] < loss["initial"]["loss"]
    mine, base = load(run), load(run.parent / "base")
    assert (mine[2]["quantization"], base[2]["quantization"]) == (bits, None)
    expected = logits(mine)
    assert (expected - logits(base)).abs().max() > 0.1
    for form, packed in (("merged", None), ("lora", bits), ("adapter", bits)):
        said = export(cli, run, form)
        assert said["check"]["difference"] <= said["check"]["judged"]["tolerance"]
        loaded = load(form)
        assert loaded[2]["quantization"] == packed
        torch.testing.assert_close(logits(loaded), expected, atol=2e-4, rtol=0)
        assert answers(loaded) == answers(mine) != answers(base)


@pytest.mark.parametrize("name", METHODS)
def test_exports_of_a_half_precision_run_match_the_run(
    name: str, cli: Cli, trained: Trained
) -> None:
    """The adapter is checked in the training precision. Dequantized weights are rounded again."""
    run = trained(name, "4bit", *HALF)
    mine = load(run)
    assert (mine[2]["dtype"], mine[2]["quantization"]) == ("bfloat16", "4bit")
    assert export(cli, run, "adapter")["check"]["difference"] == 0.0
    assert torch.equal(logits(load("adapter")), logits(mine))
    lora = export(cli, run, "lora")["check"]
    assert lora["difference"] <= lora["judged"]["tolerance"]
    # A base of half precision is quantized in it, whatever dtype its files are in.
    there = load("lora")[0]
    packed = quantized_layers(mine[0])
    for layer, weight in quantized_layers(there).items():
        assert torch.equal(dequantized(weight), dequantized(packed[layer]))
    assert len(packed) == 7 * 3


def test_an_edited_recipe_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained("core", "4bit"), tmp_path / "run"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("quantization: 4bit", "quantization: 8bit"))
    with pytest.raises(FileFormatError, match=r"quantization is '8bit', it was '4bit'"):
        load(run)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"quantization": "2bit", "dtype": "x"}}'])
def test_a_damaged_export_record_is_refused(text: str, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(trained("lora", "4bit").parent / "base")})
    )
    (tmp_path / "lora" / "adapter_model.safetensors").touch()
    (tmp_path / "lora" / "export.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"export\.json"):
        load(tmp_path / "lora")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_packed_weights_can_answer_but_not_train(
    bits: str, double: bool, trained: Trained, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = trained("lora", "4bit").parent / "base"
    settings: Any = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
    )
    stored: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    folder = Path(shutil.copytree(base, tmp_path / "packed"))
    (folder / "model.safetensors").unlink()
    stored.save_pretrained(folder)
    assert any(t.dtype in (torch.int8, torch.uint8) for t in _tensors(folder))
    loaded = load(folder)
    assert loaded[2]["quantization"] == bits and len(answers(loaded)) == len(QUESTIONS)
    # The digest is of scales, too.
    mark = loaded[2]["digest"]
    assert load(folder)[2]["digest"] == mark == weights_digest(loaded[0])
    next(iter(quantization_state(loaded[0]))).view(-1)[0] *= 2
    assert weights_digest(loaded[0]) != mark
    with pytest.raises(UsageError, match="quantized already"):
        data = base.parent / "talk.jsonl"
        train(tmp_path / "run", folder, data, "method=lora", "task.max_length=64")


def _tensors(folder: Path) -> list[Tensor]:
    return [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
