"""Ordinary chat data from files or the hub, one conversation a row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from sparsegrad_cli.data.chat_dataset import RawChat
from sparsegrad_cli.data.chat_rows import KINDS, RowReader, UnusableRowError
from sparsegrad_cli.data.chat_settings import ChatSettings
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.drop_counts import Tally
from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.hub import hub_table, load_hub_splits
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
from sparsegrad_cli.data.validation_split import check_fraction_unused, held_out
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import suggest

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_CHAT_COLUMNS = ("messages", "conversations")
_PREFERENCES = ("chosen", "rejected")


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
    tables, notes = _tables(path)
    return _raw(tables, settings, notes)


def check_chat_columns(path: Path, settings: ChatSettings) -> None:
    """Refuse files whose columns hold no conversations; errors as :func:`load_chat_files`."""
    for table in _tables(path)[0].values():
        _reader(table, settings)


def _tables(path: Path) -> tuple[dict[str, Table], list[str]]:
    if path.is_file():
        return {"train": read_table(path, "json")}, lone_shard_note(path)
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
    return tables, unread_note(path, [*train, *validation])


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
    counted: Counter[str] = Counter()
    readers = {name: _reader(table, settings) for name, table in tables.items()}
    parts = {name: _read(table, readers[name], dropped, counted) for name, table in tables.items()}
    read = sum(len(table) for table in tables.values())
    kept = sum(map(len, parts.values()))
    if not kept:
        raise DataError(
            f"no conversation is left of {read} rows: {dropped.sentence()}",
            where=next(iter(tables.values())).source,
        )
    counts = {"rows read": read, **dropped.listed("rows dropped: "), "rows kept": kept, **counted}
    for reason, place in dropped.first.items():
        notes.append(f"{dropped.counts[reason]} x {reason}; first: {place}")
    notes += _unused(readers.values())
    if settings.split == "source" and "validation" not in parts:
        raise UsageError(
            "there is no validation part",
            where="task.chat.split",
            fix="split: hash; or a folder with train and validation files",
        )
    if settings.split != "hash" and "validation" in parts:
        return _by_source(parts, settings, counts, notes)
    return _by_hash(parts, settings, counts, notes)


def _unused(readers: Iterable[RowReader]) -> list[str]:
    """A note on the keys that nothing reads, with how many rows or messages have each."""
    parts = []
    for unit in ("rows", "messages"):
        total = sum((reader.unused[unit] for reader in readers), Counter[str]())
        found = sorted(total.items(), key=lambda item: (-item[1], item[0]))
        parts += [f"{key} ({count} {unit})" for key, count in found if count]
    return [f"keys that are not used: {', '.join(parts)}"] if parts else []


def _read(
    table: Table, reader: RowReader, dropped: Tally, counted: Counter[str]
) -> list[Conversation]:
    """The conversations of a file or split, each with its place; its group is its opening."""
    conversations = []
    for at in range(len(table)):
        place = table.place(at)
        try:
            found = reader.read(table.row(at), place)
        except UnusableRowError as error:
            dropped.add(str(error), place)
            continue
        counted.update(found.counts)
        group = _opening(found.turns)
        conversations.append(Conversation(found.turns, group, found.tools, place))
    return conversations


def _reader(table: Table, settings: ChatSettings) -> RowReader:
    """What reads the rows of this table, by the settings or by the columns' names."""
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
            f"kind {settings.kind} has its own columns: {', '.join(KINDS[settings.kind])}",
            where="task.chat.column",
        )
    found = {name: "messages" for name in _CHAT_COLUMNS if name in names}
    if column is not None:
        found = {column: "messages"}
    else:
        for kind, columns in KINDS.items():
            if all(name in names for name in columns):
                found[" and ".join(columns)] = kind
    if settings.kind != "auto":
        found = {name: kind for name, kind in found.items() if kind == settings.kind}
    if len(found) != 1:
        raise _which_columns(table, list(found))
    name, kind = next(iter(found.items()))
    if kind == settings.kind or kind != "prompt_completion" or "label" not in names:
        return RowReader(kind, name, table.typed)
    if all(isinstance(label, bool) for label in table.columns["label"]):
        raise DataError(
            "the label column says which completions are good: this is preference data, and every "
            "completion would be learnt",
            where=table.source,
            fix="leave out the rows that are not to be learnt, then the column; or "
            "task.chat.kind=prompt_completion, which learns every row",
        )
    return RowReader(kind, name, table.typed)


def _which_columns(table: Table, found: list[str]) -> UsageError:
    if found:
        return UsageError(
            f"{table.source} has {' as well as '.join(found)}",
            where="task.chat.kind",
            fix="choose by task.chat.kind (messages, prompt_completion, instruction) or by "
            "task.chat.column",
        )
    if all(name in table.columns for name in _PREFERENCES):
        return UsageError(
            f"{table.source} is preference data (chosen and rejected answers), which is not "
            "learnt from here",
            where="task.path",
            fix="task.chat.column=chosen learns the chosen answers, where they are lists of "
            "messages",
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
    parts: Mapping[str, list[Conversation]],
    settings: ChatSettings,
    counts: dict[str, int],
    notes: list[str],
) -> RawChat:
    every = [each for part in parts.values() for each in part]
    groups = (each.group for each in every)
    held, note = held_out(groups, settings.validation_fraction, "opening prompts")
    train = [each for each in every if each.group not in held]
    validation = [each for each in every if each.group in held]
    return RawChat(train, validation, "opening prompts", counts, [*notes, note])


def _by_source(
    parts: Mapping[str, list[Conversation]],
    settings: ChatSettings,
    counts: dict[str, int],
    notes: list[str],
) -> RawChat:
    """As the user split it: a row is a group. That both sides share prompts is only noted."""
    check_fraction_unused(settings.validation_fraction)
    openings = {each.group for each in parts["train"]}
    shared = sum(each.group in openings for each in parts["validation"])
    if shared:
        notes = [*notes, f"{shared} validation rows open with a prompt that training has too"]
    train, validation = (
        [replace(each, group=each.place) for each in parts[name]]
        for name in ("train", "validation")
    )
    return RawChat(train, validation, "rows", counts, notes)
