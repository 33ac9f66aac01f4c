"""The real export, both of its files, against counts made without the reader."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.oasst_samples import EXPECTED, all_conversations, flat, groups_by_split, read, write
from support.paths import REPO, shared_data

# --- the real files


def naive(file: Path) -> dict[str, Any]:
    """Count an export by plain recursion, without the reader."""
    roots = [json.loads(line) for line in file.open(encoding="utf-8")]
    roots = [root.get("prompt", root) for root in roots]
    ids: set[str] = set()
    threads: set[tuple[str, ...]] = set()
    best = 0

    def walk(message: dict[str, Any], path: tuple[str, ...]) -> None:
        ids.add(message["message_id"])
        path = (*path, message["text"])
        for reply in message["replies"]:
            walk(reply, path)
        if message["role"] == "assistant" and not any(p["replies"] for p in message["replies"]):
            threads.add(path)

    for root in roots:
        walk(root, ())
        at = root
        while at["replies"]:
            best += at["role"] == "prompter"
            open_ = [r for r in at["replies"] if r["role"] == "assistant" or r["replies"]]
            ranked = [r for r in open_ if r.get("rank") is not None]
            if not open_:
                break
            at = (
                min(ranked, key=lambda r: r["rank"])
                if ranked
                else min(open_, key=lambda r: r["message_id"])
            )
    replies = {path[: i + 1] for path in threads for i in range(1, len(path), 2)}
    return {
        "trees": len(roots),
        "messages": len(ids),
        "threads": threads,
        "repeated": sum(len(path) // 2 for path in threads),
        "replies": replies,
        "best": best,
    }


@pytest.mark.parametrize("name", ["en_100_trees.jsonl", "en_100_messages.jsonl"])
def test_real_export_against_a_naive_count(name: str) -> None:
    file = shared_data() / "oasst" / name
    if not file.is_file():
        pytest.skip(f"{name} is not on this machine")
    counted = naive(file)
    data = {paths: read(file, paths=paths) for paths in EXPECTED}
    every = {paths: [*each.train, *each.validation] for paths, each in data.items()}
    texts = {tuple(turn.text for turn in each.turns) for each in every["threads"]}
    assert texts == counted["threads"] and len(every["threads"]) == len(texts) == 546
    texts = {tuple(turn.text for turn in each.turns) for each in every["replies"]}
    assert texts == counted["replies"] and len(every["replies"]) == len(texts) == 687
    counts = data["threads"].counts
    assert counts["trees found"] == counted["trees"] == 100
    assert counts["messages read"] == counted["messages"] == 1167
    assert counts["messages kept"] == 1167 and counts["messages in conversations"] == 941
    for paths, learnt in (("threads", counted["repeated"]), ("best", counted["best"])):
        counts = data[paths].counts
        both = [counts[f"{side} assistant turns learnt"] for side in ("training", "validation")]
        assert sum(both) == learnt == {"threads": 903, "best": 145}[paths]
    assert len(every["best"]) == 100
    for paths, each in data.items():
        print(name, paths, dict(each.counts))


def test_counts_of_the_documentation() -> None:
    file = shared_data() / "oasst" / "en_100_trees.jsonl"
    if not file.is_file():
        pytest.skip("en_100_trees.jsonl is not on this machine")
    page = (REPO / "docs" / "reference" / "chat-data.md").read_text(encoding="utf-8")
    table = page[page.index("| | `threads` | `best` | `replies` |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in table.splitlines()[2:]]
    for paths, column in zip(EXPECTED, zip(*rows, strict=True), strict=True):
        counts = read(file, paths=paths).counts
        names = ["trees found", "messages read", None, "prompts cut, nothing answers them"]
        names += ["messages off the chosen paths", "messages in conversations"]
        for side in ("training", "validation"):
            names += [f"{side} trees", f"{side} conversations"]
            names += [f"{side} assistant turns learnt", f"{side} assistant turns learnt, distinct"]
        written = [int(number) for cell in column for number in cell.split(" / ")]
        assert written == [counts.get(name, 0) if name else 0 for name in names]
        assert not any("dropped" in name for name in counts)


def test_both_real_files_give_the_same_conversations() -> None:
    folder = shared_data() / "oasst"
    if not (folder / "en_100_messages.jsonl").is_file():
        pytest.skip("the OpenAssistant files are not on this machine")
    for paths in EXPECTED:
        trees = read(folder / "en_100_trees.jsonl", paths=paths)
        messages = read(folder / "en_100_messages.jsonl", paths=paths)
        assert trees.train == messages.train and trees.validation == messages.validation
        assert trees.data_hash == messages.data_hash and trees.counts == messages.counts
    assert read(folder).data_hash == read(folder / "en_100_trees.jsonl").data_hash


def test_real_trees_as_truly_flat_messages_in_any_order(tmp_path: Path) -> None:
    file = shared_data() / "oasst" / "en_100_trees.jsonl"
    if not file.is_file():
        pytest.skip("en_100_trees.jsonl is not on this machine")
    rows = [row for line in file.open(encoding="utf-8") for row in flat(json.loads(line)["prompt"])]
    whole = read(file)
    assert read(write(tmp_path / "flat.jsonl", *rows)).data_hash == whole.data_hash
    random.Random(2).shuffle(rows)
    shuffled = read(write(tmp_path / "shuffled.jsonl", *rows))
    assert all_conversations(shuffled) == all_conversations(whole) and groups_by_split(
        shuffled
    ) == groups_by_split(whole)
    assert shuffled.counts == whole.counts
