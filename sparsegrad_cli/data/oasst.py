"""OpenAssistant conversations (Koepf et al. 2023, arXiv 2304.07327): hub, exports, folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.chat_dataset import RawChat
from sparsegrad_cli.data.chat_settings import ChatSettings
from sparsegrad_cli.data.conversation import Conversation
from sparsegrad_cli.data.conversation_paths import Threads, threads
from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.hub import load_hub_splits
from sparsegrad_cli.data.json_files import json_records
from sparsegrad_cli.data.oasst_messages import NO_MESSAGE, Message, Source, messages_of
from sparsegrad_cli.data.oasst_trees import BELOW, EXPECTED, FILTER, Forest, grow, speaks
from sparsegrad_cli.data.split_files import (
    PREFERRED,
    TRAIN_STEMS,
    VALIDATION_STEMS,
    find_split,
    is_unreadable,
    unreadable,
)
from sparsegrad_cli.data.text_files import COMPRESSIONS, unpacked_name
from sparsegrad_cli.data.validation_split import check_fraction_unused, held_out
from sparsegrad_cli.errors import DataError, UsageError

HUB_ID = "OpenAssistant/oasst1"
_COLUMNS = (
    *("message_id", "parent_id", "text", "role", "lang", "review_result", "deleted"),
    *("rank", "labels", "message_tree_id", "tree_state"),
)
_SUFFIXES = (*PREFERRED["json"], ".parquet")
# What an export file is named after; ready trees are finished ones, all trees any.
_NAMES = ("ready.trees", "ready.messages", "all.trees", "all.messages", "trees", "messages")
_OTHER = ("spam", "prompts")  # message files that hold no trees

Record = tuple[Any, Source]


def load_oasst(path: Path | None, settings: ChatSettings) -> RawChat:
    """OpenAssistant trees as conversations.

    Args:
        path: an export file (trees or messages; JSON lines, gzip or plain, or Parquet); a folder
            with one, or with the hub's train and validation files; None takes the hub.
        settings: checked; docs/chat_data.md says what each does.

    Raises:
        UsageError: ``split: source`` where the source has no validation part.
        DataError: files that cannot be read, are not OpenAssistant's, or leave no conversation.
        DownloadError: the hub's set is neither cached nor reachable.
    """
    if path is None:
        records, notes = _from_hub(settings.hub or HUB_ID)
        where = settings.hub or HUB_ID
    else:
        records, notes = _from_path(path)
        where = str(path)
    return from_records(records, settings, where=where, notes=notes)


def from_records(
    records: Iterable[Record],
    settings: ChatSettings,
    *,
    where: str,
    notes: list[str],
    by_source: bool = False,
) -> RawChat:
    """Conversations from records of an export, wherever they come from.

    Args:
        records: (record, where it stands), in source order.
        settings: checked.
        where: the source, for errors.
        notes: what is to be known of it.
        by_source: what ``split: auto`` means: the source's split instead of the hash.

    Raises:
        UsageError, DataError: as load_oasst.
    """
    forest = grow(_messages(records, where), settings)
    found = threads(forest, settings.paths)
    if not found.of_tree:
        raise DataError(
            f"no conversation is left of {forest.read} messages: {forest.dropped.sentence()}",
            where=where,
            fix="an assistant's reply to a prompt is needed; see the filters of the task",
        )
    notes = [*notes, *_notes(forest, settings)]
    by_source = settings.split == "source" or (settings.split == "auto" and by_source)
    if by_source:
        check_fraction_unused(settings.validation_fraction)
    split = _by_source if by_source else _by_hash
    train, validation, note = split(found, settings, where)
    counts = _counts(forest, found)
    return RawChat(train, validation, "trees", counts, [*notes, note] if note else notes)


def _messages(records: Iterable[Record], where: str) -> Iterator[Message]:
    """Every message of every record; refuses a source in which there is none at all."""
    usable = read = 0
    for record, source in records:
        read += 1
        for message in messages_of(record, source):
            usable += message.fault != NO_MESSAGE
            yield message
    if not read:
        raise DataError("the source holds no records", where=where)
    if not usable:
        raise DataError(
            f"none of the {read} records is an OpenAssistant tree or message",
            where=where,
            fix="a tree has message_tree_id and prompt, a message has message_id, parent_id, text "
            "and role; other conversations are read by task.name: chat",
        )


def _notes(forest: Forest, settings: ChatSettings) -> Iterator[str]:
    """Where damage was first met, and languages that were asked for in vain."""
    for tally in (forest.remarks, forest.dropped):
        for reason, place in tally.first.items():
            if reason not in EXPECTED and not reason.startswith(FILTER):
                yield f"{tally.counts[reason]} x {reason}; first: {place}"
    left = [tree.root for tree in forest.trees]
    left += [reply for replies in forest.replies.values() for reply in replies]
    for wanted in settings.languages or ():
        if not any(speaks(message.lang, wanted) for message in left):
            yield f"no message is left in language {wanted!r}"


def _counts(forest: Forest, found: Threads) -> dict[str, int]:
    dropped = forest.dropped.listed("messages dropped: ")
    kept = forest.read - sum(dropped.values())
    below = f"messages dropped: {BELOW}"
    counts = {
        "trees found": forest.found,
        "messages read": forest.read,
        **forest.remarks.listed(),
        **{name: count for name, count in dropped.items() if name != below},
        below: dropped.get(below, 0),
        "messages kept": kept,
        "prompts cut, nothing answers them": found.unanswered,
        "messages off the chosen paths": kept - found.unanswered - found.used,
        "messages in conversations": found.used,
        "trees with a reply to learn": len(found.of_tree),
    }
    always = ("trees found", "messages read", "messages kept")
    return {name: count for name, count in counts.items() if count or name in always}


def _by_hash(
    found: Threads, settings: ChatSettings, where: str
) -> tuple[list[Conversation], list[Conversation], str]:
    keys = (tree.key for tree, _ in found.of_tree)
    held, note = held_out(keys, settings.validation_fraction, "trees")
    every = [conversation for _, part in found.of_tree for conversation in part]
    train = [each for each in every if each.group not in held]
    return train, [each for each in every if each.group in held], note


def _by_source(
    found: Threads, settings: ChatSettings, where: str
) -> tuple[list[Conversation], list[Conversation], str]:
    parts: dict[str | None, list[Conversation]] = {"train": [], "validation": []}
    for tree, conversations in found.of_tree:
        if tree.split not in parts:
            raise UsageError(
                f"{where} is not split into training and validation",
                where="task.chat.split",
                fix="split: hash; or a folder with train and validation files",
            )
        parts[tree.split] += conversations
    return parts["train"], parts["validation"], ""


def _from_hub(hub_id: str) -> tuple[Iterator[Record], list[str]]:
    fix = (
        "point task.path at an export file (such as 2023-04-12_oasst_ready.trees.jsonl.gz) or at a "
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
        train = find_split(folder, TRAIN_STEMS, _SUFFIXES)
        validation = find_split(folder, VALIDATION_STEMS, _SUFFIXES)
        if train and validation:
            files = [(file, "train") for file in train]
            files += [(file, "validation") for file in validation]
            note = f"read {', '.join(file.name for file, _ in files)}"
            return (each for file, split in files for each in _from_file(file, split)), [note]
    file = _export_in(path)
    return _from_file(file, None), [f"read {file.name}"]


def _export_in(folder: Path) -> Path:
    """The one export file of a folder; of several kinds, the first of _NAMES."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    files = [file for file in files if not any(word in file.name for word in _OTHER)]
    for name in _NAMES:
        for suffix in _SUFFIXES:
            names = tuple(name + suffix + packing for packing in ("", *COMPRESSIONS))
            fitting = [file for file in files if file.name.lower().endswith(names)]
            if len(fitting) > 1:
                raise DataError(
                    f"the folder has several: {', '.join(file.name for file in fitting)}",
                    where=str(folder),
                    fix="let task.path be the file itself",
                )
            if fitting:
                return fitting[0]
    raise DataError(
        "the folder has no OpenAssistant file",
        where=str(folder),
        fix=f"looked for train and validation files, then for *{', *'.join(_NAMES)}, each with "
        f"{', '.join(_SUFFIXES)} (and {', '.join(COMPRESSIONS)}); or let task.path be the file "
        "itself",
    )


def _from_file(path: Path, split: str | None) -> Iterator[Record]:
    if is_unreadable(path):
        raise unreadable(path)
    if Path(unpacked_name(path)).suffix == ".parquet":
        table = read_table(path)
        names = [name for name in (*_COLUMNS, "prompt", "replies") if name in table.columns]
        for row in range(len(table)):
            record = {name: table.columns[name][row] for name in names}
            yield record, Source(table.place(row), split)
        return
    for each in json_records(path):
        yield each.value, Source(each.place, split)
