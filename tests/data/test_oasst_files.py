"""OpenAssistant data in files, folders and on the hub; invalid settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.oasst_samples import (
    EXPECTED,
    all_conversations,
    as_text,
    flat,
    large_tree,
    node,
    read,
    small_tree,
    tree,
    write,
)
from support.task_data import chat_task, load_chat

from sparsegrad_cli.errors import DataError, DownloadError, UsageError

# --- where files lie


def test_gzip_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps(tree(root)) + "\n" for root in (large_tree(), small_tree()))
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode()))
    plain = tmp_path / "misnamed.jsonl"
    plain.write_bytes(packed.read_bytes())
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf\r\n" + lines.replace("\n", "\r\n\r\n").encode())
    for file in (packed, plain, windows):
        assert all_conversations(read(file)) == set(EXPECTED["threads"])


def test_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "data"
    folder.mkdir()
    for split, root in (("train", large_tree()), ("validation", small_tree())):
        rows = [{"rank": None, "labels": None} | row | {"tree_state": "x"} for row in flat(root)]
        labels = {"name": ["quality"], "value": [0.5], "count": [3]}
        rows = [row | {"labels": labels, "message_tree_id": root["message_id"]} for row in rows]
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001-abc.parquet")
    settings: dict[str, Any] = {"tree_states": ("x",), "min_quality": 0.5, "split": "source"}
    data = read(tmp_path, **settings)
    assert {as_text(each) for each in data.train} == set(EXPECTED["threads"]) - {"q1 a7*"}
    assert [as_text(each) for each in data.validation] == ["q1 a7*"]


def test_ready_trees_are_preferred_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "2023_oasst_all.messages.jsonl", *flat(node("m", node("a"))), small_tree())
    write(tmp_path / "2023_oasst_spam.messages.jsonl", node("spam", node("a")))
    assert "m a*" in all_conversations(read(tmp_path))
    write(tmp_path / "2023_oasst_ready.trees.jsonl", tree(node("r", node("a"))), tree(small_tree()))
    data = read(tmp_path)
    assert "r a*" in all_conversations(data) and "read 2023_oasst_ready.trees.jsonl" in data.notes
    write(tmp_path / "2024_oasst_ready.trees.jsonl", tree(node("r", node("a"))))
    with pytest.raises(DataError, match=r"several: 2023_oasst.*, 2024_oasst"):
        read(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no OpenAssistant file\n.*\n.*ready\.trees"):
        read(empty)
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "gone")


# --- the hub


def test_an_unreachable_hub_is_reported_with_the_local_alternative(empty_hub_cache: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        load_chat("oasst")
    text = str(caught.value)
    assert "OpenAssistant/oasst1" in text and "HF_HUB_OFFLINE is set" in text
    assert "task.path" in text


def test_hub_cache_is_read_like_the_export(empty_hub_cache: Path) -> None:
    fill_cache(
        empty_hub_cache,
        {"train": [large_tree(), node("p9", node("a9"))], "validation": [small_tree()]},
    )
    data = load_chat("oasst")
    assert all_conversations(data) == set(EXPECTED["threads"]) | {"p9 a9*"}
    assert "cached copy" in data.notes[0]
    own = load_chat("oasst", split="source", min_quality=0.5)
    assert [as_text(each) for each in own.validation] == ["q1 a7*"]


def fill_cache(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Write the cache that the hub's library leaves after a download of oasst1."""
    from datasets import DatasetInfo, Features, Sequence, SplitDict, SplitInfo, Value
    from datasets.arrow_writer import ArrowWriter

    words = ["message_id", "parent_id", "text", "role", "lang", "message_tree_id", "tree_state"]
    counts = {"name": Value("string"), "value": Value("float64"), "count": Value("int32")}
    features = Features(
        {name: Value("string") for name in words}
        | {name: Value("bool") for name in ("review_result", "deleted")}
        | {"rank": Value("int32"), "labels": Sequence(counts), "user_id": Value("string")}
    )
    folder = folder / "OpenAssistant___oasst1" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    infos = SplitDict()
    labels = {"name": ["quality"], "value": [0.8], "count": [3]}
    for split, roots in splits.items():
        writer = ArrowWriter(path=str(folder / f"oasst1-{split}.arrow"), features=features)
        for root in roots:
            for row in flat(root):
                more = {"rank": None, "tree_state": "ready_for_export", "labels": labels}
                writer.write(more | row | {"message_tree_id": root["message_id"], "user_id": "u"})
        count, size = writer.finalize()
        infos.add(SplitInfo(split, num_examples=count, num_bytes=size))
    info = DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name="oasst1",
        config_name="default",
        version="0.0.0",
        splits=infos,
    )
    info.write_to_directory(str(folder))


# --- settings


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"paths": "all"}, "paths"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"max_rank": -1}, "max_rank"),
        ({"min_quality": 2.0}, "min_quality"),
        ({"min_quality": float("nan")}, "min_quality"),
        ({"languages": ()}, "languages"),
        ({"tree_states": ()}, "tree_states"),
        ({"hub": "just-a-name"}, "hub"),
    ],
)
def test_invalid_settings_are_refused_by_the_section(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        chat_task("oasst", **settings)


def test_an_unknown_task_and_a_missing_path_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean oasst"):
        load_chat("oast")
    with pytest.raises(UsageError, match="task chat needs a path"):
        load_chat("chat")


def test_a_path_and_a_hub_id_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"either task\.path or task\.chat\.hub, got both"):
        read(tmp_path, hub="a/b")
    with pytest.raises(UsageError, match="takes no path"):
        read(tmp_path, "builtin:dialogues")
