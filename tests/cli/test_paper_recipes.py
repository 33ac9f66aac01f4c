"""The paper's GLUE recipes, run for a few steps on small random models saved as local folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli_runs import Cli

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "big",
    "small",
    "red",
    "runs",
    "sleeps",
    "under",
    "over",
    "house",
    "tree",
]


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 3, 5, 7, 11))


def make_rte(folder: Path) -> Path:
    """RTE in GLUE's original TSV layout, a few rows, one with a bare quote."""
    task = folder / "glue" / "RTE"
    task.mkdir(parents=True)
    for name, size in (("train", 48), ("dev", 16)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(size):
            label = ("entailment", "not_entailment")[i % 2]
            lines.append(f'{i}\t"{sentence(i)}\t{sentence(i + 1)}\t{label}')
        (task / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "glue"


def make_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", '"', *WORDS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertForMaskedLM(config).save_pretrained(str(folder))
    return folder


def make_roberta(folder: Path) -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([sentence(i) for i in range(50)], 400, special_tokens=special)
    from tokenizers.processors import RobertaProcessing

    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    tokenizer.save_pretrained(str(folder))
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    RobertaForMaskedLM(config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("recipe", "make", "architecture"),
    [
        ("configs/bert_glue.yaml", make_bert, "BertForSequenceClassification"),
        ("configs/roberta_glue.yaml", make_roberta, "RobertaForSequenceClassification"),
        ("configs/roberta_large_glue.yaml", make_roberta, "RobertaForSequenceClassification"),
    ],
)
def test_paper_recipe_trains_on_a_local_model(
    cli: Cli, tmp_path: Path, recipe: str, make: object, architecture: str
) -> None:
    assert callable(make)
    model, glue = make(tmp_path / "model"), make_rte(tmp_path)
    outcome = cli(
        "train", recipe, f"model={model}", f"task.path={glue}", "train.max_steps=4",
        "train.eval_steps=2", "calibration.steps=2", "-o", "run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["model"]["architecture"] == architecture
    assert run["method"]["scope"] == "rest" and run["counts"]["trainable_rest"] > 0
    assert run["counts"]["trainable_targets"] == 4 * round(0.012 * 32 * 64)
    assert run["memory"]["batch_shape"][1] == 128  # the protocol's fixed padding
    assert [record["step"] for record in run["metrics"]["history"]] == [0, 2, 4]
    assert all(record["loss"] > 0 for record in run["metrics"]["train"])
