"""Read OpenAssistant conversations (Koepf et al. 2023, arXiv 2304.07327) from files or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.conversation import RawChat, refuse_fraction, split_by_hash
from sparsegrad_cli.data.hub import load_hub_splits
from sparsegrad_cli.data.json_files import json_records
from sparsegrad_cli.data.oasst_messages import NOT_A_MESSAGE, Message, Source, messages_of
from sparsegrad_cli.data.oasst_trees import (
    BELOW,
    FILTER,
    NOT_DAMAGE,
    Forest,
    Paths,
    conversations_of,
    matches_language,
    prune,
)
from sparsegrad_cli.data.read_table import file_format, read_table
from sparsegrad_cli.data.split_files import (
    SUFFIXES_OF,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    find_split,
)
from sparsegrad_cli.data.text_files import COMPRESSIONS
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.recipe.task_section import ChatSection, TaskSection

_HUB_ID = "OpenAssistant/oasst1"
_COLUMNS = (
    *("message_id", "parent_id", "text", "role", "lang", "review_result", "deleted"),
    *("rank", "labels", "message_tree_id", "tree_state"),
)
_SUFFIXES = (*SUFFIXES_OF["json"], ".parquet")
# Ends of the names of export files, the preferred one first. "ready" trees are finished.
_EXPORT_NAMES = (
    *("ready.trees", "ready.messages", "all.trees", "all.messages"),
    *("trees", "messages"),
)
_WITHOUT_TREES = ("spam", "prompts")  # export files of messages that belong to no tree

Record = tuple[Any, Source]


def load_oasst(task: TaskSection) -> RawChat:
    """Read OpenAssistant trees as conversations.

    ``task.path`` is an export file (trees or messages), a folder with one, or a folder with the
    hub's train and validation files. Without a path, the data comes from the hub.

    Raises:
        UsageError: ``split: source`` for a source without a validation part.
        DataError: files cannot be read, are not OpenAssistant's, or leave no conversation.
        DownloadError: the hub's data set is neither cached nor reachable.
    """
    if task.path is None:
        where = (task.chat or ChatSection()).hub or _HUB_ID
        records, notes = _from_hub(where)
    else:
        where = str(expanded(task.path))
        records, notes = _from_path(Path(where))
    return conversations_from(records, task, where=where, notes=notes)


def conversations_from(
    records: Iterable[Record],
    task: TaskSection,
    *,
    where: str,
    notes: Iterable[str] = (),
    has_split: bool = False,
) -> RawChat:
    """Make conversations of the records of an export.

    Args:
        records: (record, its source), in source order.
        task: paths, filters and split.
        where: the source, for errors.
        notes: notes on the source.
        has_split: whether ``split: auto`` means the split of the source instead of the hash.

    Raises:
        UsageError, DataError: as :func:`load_oasst`.
    """
    chat = task.chat or ChatSection()
    forest = prune(_messages(records, where), chat)
    paths = conversations_of(forest, chat.paths)
    if not paths.by_tree:
        raise DataError(
            f"no conversation is left of {forest.read} messages: {forest.dropped.sentence()}",
            where=where,
            fix="an assistant's reply to a prompt is needed; check the filters of task.chat",
        )
    notes = [*notes, *_notes(forest, chat)]
    counts = _counts(forest, paths)
    if chat.split == "source" or (chat.split == "auto" and has_split):
        refuse_fraction(task)
        return _by_source(paths, counts, notes, where)
    every = [conversation for _, part in paths.by_tree for conversation in part]
    train, validation, note = split_by_hash(every, task.validation_fraction, "trees")
    return RawChat(train, validation, "trees", counts, [*notes, note])


def _messages(records: Iterable[Record], where: str) -> Iterator[Message]:
    """Yield every message of every record; refuse a source without any."""
    messages = read = 0
    for record, source in records:
        read += 1
        for message in messages_of(record, source):
            messages += message.fault != NOT_A_MESSAGE
            yield message
    if not read:
        raise DataError("the source holds no records", where=where)
    if not messages:
        raise DataError(
            f"none of the {read} records is an OpenAssistant tree or message",
            where=where,
            fix="a tree has message_tree_id and prompt, a message has message_id, parent_id, text "
            "and role; for other conversations set task.name: chat",
        )


def _notes(forest: Forest, chat: ChatSection) -> Iterator[str]:
    """Yield notes on where damage was first met, and on languages without a message."""
    for counts in (forest.unusable_values, forest.dropped):
        for reason in counts.counts:
            if reason not in NOT_DAMAGE and not reason.startswith(FILTER):
                yield counts.note(reason)
    left = [tree.root for tree in forest.trees]
    left += [reply for replies in forest.replies.values() for reply in replies]
    for wanted in chat.languages or ():
        if not any(matches_language(message.lang, wanted) for message in left):
            yield f"no message is left in language {wanted!r}"


def _counts(forest: Forest, paths: Paths) -> dict[str, int]:
    dropped = forest.dropped.listed("messages dropped: ")
    kept = forest.read - sum(dropped.values())
    below = f"messages dropped: {BELOW}"
    counts = {
        "trees found": forest.found,
        "messages read": forest.read,
        **forest.unusable_values.listed(),
        **{name: count for name, count in dropped.items() if name != below},
        below: dropped.get(below, 0),
        "messages kept": kept,
        "prompts cut, nothing answers them": paths.unanswered,
        "messages off the chosen paths": kept - paths.unanswered - paths.used,
        "messages in conversations": paths.used,
        "trees with a reply to learn": len(paths.by_tree),
    }
    always = ("trees found", "messages read", "messages kept")
    return {name: count for name, count in counts.items() if count or name in always}


def _by_source(paths: Paths, counts: dict[str, int], notes: list[str], where: str) -> RawChat:
    raw = RawChat([], [], "trees", counts, notes)
    for tree, conversations in paths.by_tree:
        if tree.split not in ("train", "validation"):
            raise UsageError(
                f"{where} is not split into training and validation",
                where="task.chat.split",
                fix="set split: hash, or use a folder with train and validation files",
            )
        (raw.train if tree.split == "train" else raw.validation).extend(conversations)
    return raw


def _from_hub(hub_id: str) -> tuple[Iterator[Record], list[str]]:
    fix = (
        "set task.path to an export file (such as 2023-04-12_oasst_ready.trees.jsonl.gz) or to a "
        "folder with the hub's Parquet files, or connect once to fill the cache"
    )
    loaded, notes = load_hub_splits(hub_id, ("train", "validation"), called="oasst", fix=fix)

    def records() -> Iterator[Record]:
        for split, data in loaded.items():
            columns = [name for name in _COLUMNS if name in data.column_names]
            for row, record in enumerate(data.select_columns(columns).to_list(), start=1):
                yield record, Source(f"{hub_id} {split}, row {row}", split)

    return records(), notes


def _from_path(path: Path) -> tuple[Iterator[Record], list[str]]:
    if path.is_file():
        return _from_file(path, None), []
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}", where="task.path")
    for folder in (path, path / "data"):
        train = find_split(folder, TRAIN_NAMES, _SUFFIXES)
        validation = find_split(folder, VALIDATION_NAMES, _SUFFIXES)
        if train and validation:
            files = [(file, "train") for file in train]
            files += [(file, "validation") for file in validation]
            note = f"read {', '.join(file.name for file, _ in files)}"
            return (each for file, split in files for each in _from_file(file, split)), [note]
    file = _export_file(path)
    return _from_file(file, None), [f"read {file.name}"]


def _export_file(folder: Path) -> Path:
    """Return the export file of a folder; of several kinds, the first of ``_EXPORT_NAMES``."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    files = [file for file in files if not any(word in file.name for word in _WITHOUT_TREES)]
    for name in _EXPORT_NAMES:
        for suffix in _SUFFIXES:
            ends = tuple(name + suffix + compression for compression in ("", *COMPRESSIONS))
            found = [file for file in files if file.name.lower().endswith(ends)]
            if len(found) > 1:
                raise DataError(
                    f"the folder has several: {', '.join(file.name for file in found)}",
                    where=str(folder),
                    fix="set task.path to the file itself",
                )
            if found:
                return found[0]
    raise DataError(
        "the folder has no OpenAssistant file",
        where=str(folder),
        fix=f"tried train and validation files, then *{', *'.join(_EXPORT_NAMES)}, each with "
        f"{', '.join(_SUFFIXES)} (and {', '.join(COMPRESSIONS)}); or set task.path to the file "
        "itself",
    )


def _from_file(path: Path, split: str | None) -> Iterator[Record]:
    if file_format(path, "json") == ".parquet":
        table = read_table([path])
        names = [name for name in (*_COLUMNS, "prompt", "replies") if name in table.columns]
        for row in range(len(table)):
            record = {name: table.columns[name][row] for name in names}
            yield record, Source(table.place(row), split)
        return
    for each in json_records(path):
        yield each.value, Source(each.place, split)
