"""Ordinary chat data from files or the hub, one conversation a row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.chat_rows import (
    UnusableRowError,
    settled,
    turns_of_completion,
    turns_of_instruction,
    turns_of_messages,
)
from sparsegrad_cli.data.chat_settings import ChatSettings
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.held_out import held_out
from sparsegrad_cli.data.hub import hub_table, load_hub_splits
from sparsegrad_cli.data.raw_chat import RawChat
from sparsegrad_cli.data.spec import suggest
from sparsegrad_cli.data.split_files import (
    TRAIN_STEMS,
    VALIDATION_STEMS,
    find_split,
    lone_shard_note,
    no_training_file,
    split_folder,
    unread_note,
)
from sparsegrad_cli.data.table import Table
from sparsegrad_cli.data.tally import Tally
from sparsegrad_cli.errors import DataError, UsageError

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_CHAT_COLUMNS = ("messages", "conversations")
_KINDS = {"prompt_completion": ("prompt", "completion"), "instruction": ("instruction", "output")}
_Turns = Callable[[Mapping[str, Any], str], list[Turn]]


@dataclass(frozen=True)
class _Part:
    """The conversations of one file or split, with the place of each."""

    conversations: list[tuple[Turn, ...]]
    places: list[str]


def load_chat_files(path: Path, settings: ChatSettings) -> RawChat:
    """Chat data of the user's own.

    Args:
        path: a file (JSON lines, JSON, CSV, TSV, plain or compressed; Parquet), or a folder with
            train.* and, where it has one, validation.* (or dev.*, valid.*, val.*).
        settings: checked.

    Raises:
        UsageError: columns that are of no kind or of two; ``split: source`` without a validation
            file.
        DataError: files that cannot be read, hold something else than text, or leave no
            conversation.
    """
    if path.is_file():
        return _raw({"train": read_table(path, "json")}, settings, lone_shard_note(path))
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}", where="task.path")
    folder = split_folder(path, _SUFFIXES)
    train = find_split(folder, TRAIN_STEMS, _SUFFIXES)
    if not train:
        raise no_training_file(path, _SUFFIXES)
    tables = {"train": read_table(train, "json")}
    validation = find_split(folder, VALIDATION_STEMS, _SUFFIXES)
    if validation:
        tables["validation"] = read_table(validation, "json")
    return _raw(tables, settings, unread_note(folder, [*train, *validation]))


def load_hub_chat(settings: ChatSettings) -> RawChat:
    """Chat data from the hub: ``settings.hub`` names it, its splits and its column.

    Raises:
        UsageError: no such split or column.
        DataError: as load_chat_files.
        DownloadError: it is neither cached nor reachable.
    """
    hub_id = str(settings.hub)
    loaded, notes = load_hub_splits(
        hub_id,
        None,
        config=settings.config,
        called=f"task.chat.hub: {hub_id}",
        fix="point task.path at local files instead, or connect once to fill the cache; a data set "
        "with several configurations needs task.chat.config",
    )
    names = {"train": settings.train_split, "validation": settings.validation_split}
    if names["validation"] is None and "validation" in loaded:
        names["validation"] = "validation"
    tables = {}
    for part, name in names.items():
        if name is None:
            continue
        if name not in loaded:
            raise UsageError(
                f"{hub_id} has no split {name!r}",
                where=f"task.chat.{part}_split",
                fix=suggest(name, list(loaded)),
            )
        tables[part] = hub_table(loaded[name], f"{hub_id} {name}")
    return _raw(tables, settings, notes)


def _raw(tables: Mapping[str, Table], settings: ChatSettings, notes: list[str]) -> RawChat:
    notes = [*notes, *(note for table in tables.values() for note in table.notes)]
    dropped = Tally()
    cut: Counter[str] = Counter()
    parts = {
        name: _read(table, _reader(table, settings), dropped, cut) for name, table in tables.items()
    }
    read = sum(len(table) for table in tables.values())
    kept = sum(len(part.conversations) for part in parts.values())
    if not kept:
        raise DataError(
            f"no conversation is left of {read} rows: {dropped.sentence()}",
            where=next(iter(tables.values())).source,
        )
    counts = {"rows read": read, **dropped.listed("rows dropped: "), "rows kept": kept, **cut}
    for reason, place in dropped.first.items():
        notes.append(f"{dropped.counts[reason]} x {reason}; first: {place}")
    if settings.split == "source" and "validation" not in parts:
        raise UsageError(
            "there is no validation part",
            where="task.chat.split",
            fix="split: hash; or a folder with train and validation files",
        )
    if settings.split != "hash" and "validation" in parts:
        return _by_source(parts, counts, notes)
    return _by_hash(parts, settings, counts, notes)


def _read(table: Table, turns_of: _Turns, dropped: Tally, cut: Counter[str]) -> _Part:
    part = _Part([], [])
    for at in range(len(table)):
        row, place = table.row(at), table.place(at)
        try:
            turns, cuts = settled(turns_of(row, place), row.get("system"))
        except UnusableRowError as error:
            dropped.add(str(error), place)
            continue
        cut.update(cuts)
        part.conversations.append(turns)
        part.places.append(place)
    return part


def _reader(table: Table, settings: ChatSettings) -> _Turns:
    """What makes turns of a row of this table, by the settings or by the columns' names."""
    names = tuple(table.columns)
    column = settings.column
    if column is not None and column not in names:
        raise UsageError(
            f"there is no column {column!r} in {table.source}",
            where="task.chat.column",
            fix=suggest(column, names),
        )
    if column is not None and settings.kind not in ("auto", "messages"):
        raise UsageError(
            f"kind {settings.kind} has its own columns: {', '.join(_KINDS[settings.kind])}",
            where="task.chat.column",
        )
    found = {name: "messages" for name in _CHAT_COLUMNS if name in names}
    if column is not None:
        found = {column: "messages"}
    else:
        for kind, columns in _KINDS.items():
            if all(name in names for name in columns):
                found[" and ".join(columns)] = kind
    if settings.kind != "auto":
        found = {name: kind for name, kind in found.items() if kind == settings.kind}
    if len(found) != 1:
        raise _which_columns(table, list(found))
    name, kind = next(iter(found.items()))
    if kind == "messages":
        return lambda row, place: turns_of_messages(row, name, place)
    return turns_of_completion if kind == "prompt_completion" else turns_of_instruction


def _which_columns(table: Table, found: list[str]) -> UsageError:
    if found:
        return UsageError(
            f"{table.source} has {' as well as '.join(found)}",
            where="task.chat.kind",
            fix="choose by task.chat.kind (messages, prompt_completion, instruction) or by "
            "task.chat.column",
        )
    return UsageError(
        f"no conversation among the columns of {table.source}: {', '.join(table.columns)}",
        where="task.chat.column",
        fix=f"{' or '.join(_CHAT_COLUMNS)} (a list of messages), prompt and completion, "
        "instruction, input and output; or name the column of messages by task.chat.column",
    )


def _opening(turns: tuple[Turn, ...]) -> str:
    """The name of a conversation's first prompt: rows that answer the same one belong together."""
    text = next(turn.text for turn in turns if turn.role == "user")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _by_hash(
    parts: Mapping[str, _Part], settings: ChatSettings, counts: dict[str, int], notes: list[str]
) -> RawChat:
    every = [
        Conversation(turns, _opening(turns))
        for part in parts.values()
        for turns in part.conversations
    ]
    groups = (each.group for each in every)
    held, note = held_out(groups, settings.validation_fraction, "opening prompts")
    train = [each for each in every if each.group not in held]
    validation = [each for each in every if each.group in held]
    return RawChat(train, validation, "opening prompts", counts, [*notes, note])


def _by_source(parts: Mapping[str, _Part], counts: dict[str, int], notes: list[str]) -> RawChat:
    """As the user split it: a row is a group. That both sides share prompts is only noted."""
    openings = {_opening(turns) for turns in parts["train"].conversations}
    held = parts["validation"].conversations
    shared = sum(_opening(turns) in openings for turns in held)
    if shared:
        notes = [*notes, f"{shared} validation rows open with a prompt that training has too"]
    train, validation = (
        [Conversation(*each) for each in zip(part.conversations, part.places, strict=True)]
        for part in (parts["train"], parts["validation"])
    )
    return RawChat(train, validation, "rows", counts, notes)
