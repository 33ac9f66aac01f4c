"""Read chat data with one conversation per row, from the user's files or from the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sparsegrad_cli.data.chat_messages import UnusableRowError
from sparsegrad_cli.data.chat_rows import KINDS, RowReader
from sparsegrad_cli.data.conversation import (
    Conversation,
    DropCounts,
    RawChat,
    refuse_fraction,
    split_by_hash,
)
from sparsegrad_cli.data.hub import hub_table, load_hub_splits
from sparsegrad_cli.data.mixing import mix
from sparsegrad_cli.data.read_table import read_table
from sparsegrad_cli.data.split_files import SplitFiles, split_files
from sparsegrad_cli.data.tables import Table
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.task_section import ChatSection, TaskSection

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_MESSAGE_COLUMNS = ("messages", "conversations")
_PREFERENCE_COLUMNS = ("chosen", "rejected")


def load_chat_files(task: TaskSection) -> RawChat:
    """Read the file or folder that ``task.path`` names.

    Raises:
        UsageError: the columns hold no conversations, or two kinds of them; or ``split: source``
            without a validation file.
        DataError: a file cannot be read, or no conversation is left.
    """
    files = split_files(expanded(str(task.path)), _SUFFIXES)
    return _conversations(_tables(files), task, files.notes)


def load_chat_mix(task: TaskSection) -> RawChat:
    """Read the sources of ``task.mix``, each as :func:`load_chat_files`, and mix their training.

    Raises:
        UsageError, DataError: as :func:`load_chat_files`.
    """
    sources = task.mix or ()
    raws = [load_chat_files(task.model_copy(update={"path": s.path, "mix": None})) for s in sources]
    names, sizes = [source.label for source in sources], [len(raw.train) for raw in raws]
    for name, size in zip(names, sizes, strict=True):
        if not size:
            raise DataError(f"source {name!r} has no training conversation", where="task.mix")
    mixture = mix(names, [source.weight for source in sources], sizes, task.mix_until)
    every = [conversation for raw in raws for conversation in raw.train]
    counts = sum((Counter(raw.counts) for raw in raws), Counter[str]())
    return RawChat(
        [every[position] for position in mixture.positions],
        [conversation for raw in raws for conversation in raw.validation],
        raws[0].unit,
        dict(counts),
        [
            *(
                f"{name}: {note}"
                for name, raw in zip(names, raws, strict=True)
                for note in raw.notes
            ),
            *mixture.notes("conversations"),
        ],
        mixture=mixture,
    )


def load_chat_sets(task: TaskSection) -> tuple[dict[str, list[Conversation]], list[str]]:
    """Read the files of ``task.evaluation``.

    Returns:
        Name -> conversations, and notes on what was left out.

    Raises:
        UsageError, DataError: as :func:`load_chat_files`.
    """
    found: dict[str, list[Conversation]] = {}
    notes: list[str] = []
    for name, path in (task.evaluation or {}).items():
        table = read_table([expanded(path)], "json")
        dropped, masked_or_cut = DropCounts(), Counter[str]()
        reader = _row_reader(table, task.chat or ChatSection())
        found[name] = _read_rows(reader, dropped, masked_or_cut)
        notes += [f"{name}: {note}" for note in table.notes]
        notes += [f"{name}: {dropped.note(reason)}" for reason in dropped.counts]
        notes += [f"{name}: {count} x {reason}" for reason, count in masked_or_cut.items()]
        notes += [f"{name}: {note}" for note in _unused_key_notes([reader])]
    return found, notes


def check_chat_columns(task: TaskSection) -> None:
    """Check that the columns hold conversations; errors as :func:`load_chat_files`."""
    for path in task.train_paths:
        files = split_files(expanded(path), _SUFFIXES)
        for table in _tables(files).values():
            _row_reader(table, task.chat or ChatSection())
    for path in (task.evaluation or {}).values():
        _row_reader(read_table([expanded(path)], "json"), task.chat or ChatSection())


def load_hub_chat(task: TaskSection) -> RawChat:
    """Read the data set that ``task.chat.hub`` names.

    Raises:
        UsageError: it has no such split or column.
        DataError: as :func:`load_chat_files`.
        DownloadError: it is neither cached nor reachable.
    """
    chat = task.chat or ChatSection()
    hub_id = str(chat.hub)
    loaded, notes = load_hub_splits(
        hub_id,
        None,
        config=chat.config,
        called=f"task.chat.hub: {hub_id}",
        fix="set task.path to local files, or connect once to fill the cache; a data set with "
        "several configurations needs task.chat.config",
    )
    names = {"train": chat.train_split, "validation": chat.validation_split}
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
    return _conversations(tables, task, notes)


def _tables(files: SplitFiles) -> dict[str, Table]:
    parts = {"train": files.train, "validation": files.validation}
    return {name: read_table(part, "json") for name, part in parts.items() if part}


def _conversations(
    tables: Mapping[str, Table], task: TaskSection, file_notes: Iterable[str]
) -> RawChat:
    """Make conversations of all rows, and split them as the recipe says."""
    chat = task.chat or ChatSection()
    notes = [*file_notes, *(note for table in tables.values() for note in table.notes)]
    dropped = DropCounts()
    masked_or_cut: Counter[str] = Counter()
    readers = {name: _row_reader(table, chat) for name, table in tables.items()}
    parts = {name: _read_rows(reader, dropped, masked_or_cut) for name, reader in readers.items()}
    read = sum(len(table) for table in tables.values())
    kept = sum(map(len, parts.values()))
    if not kept:
        raise DataError(
            f"no conversation is left of {read} rows: {dropped.sentence()}",
            where=next(iter(tables.values())).source,
        )
    counts = {
        "rows read": read,
        **dropped.listed("rows dropped: "),
        "rows kept": kept,
        **masked_or_cut,
    }
    notes += [dropped.note(reason) for reason in dropped.counts]
    notes += _unused_key_notes(readers.values())
    if chat.split == "source" and "validation" not in parts:
        raise UsageError(
            "there is no validation part",
            where="task.chat.split",
            fix="set split: hash, or use a folder with train and validation files",
        )
    if chat.split != "hash" and "validation" in parts:
        refuse_fraction(task)
        return _by_source(parts, counts, notes)
    every = [each for part in parts.values() for each in part]
    unit = "opening prompts"
    train, validation, note = split_by_hash(every, task.validation_fraction, unit)
    return RawChat(train, validation, unit, counts, [*notes, note])


def _unused_key_notes(readers: Iterable[RowReader]) -> list[str]:
    """Return a note on keys that nothing reads, with the number of rows or messages of each."""
    parts = []
    for unit in ("rows", "messages"):
        total = sum((reader.unused[unit] for reader in readers), Counter[str]())
        found = sorted(total.items(), key=lambda item: (-item[1], item[0]))
        parts += [f"{key} ({count} {unit})" for key, count in found if count]
    return [f"keys that are not used: {', '.join(parts)}"] if parts else []


def _read_rows(
    reader: RowReader, dropped: DropCounts, masked_or_cut: Counter[str]
) -> list[Conversation]:
    conversations = []
    for at in range(len(reader.table)):
        try:
            conversation, counts = reader.read(at)
        except UnusableRowError as error:
            dropped.add(str(error), reader.table.place(at))
            continue
        masked_or_cut.update(counts)
        conversations.append(conversation)
    return conversations


def _row_reader(table: Table, chat: ChatSection) -> RowReader:
    """Choose how the rows of a table are read, by the settings or by the column names."""
    names = tuple(table.columns)
    if chat.column is not None and chat.column not in names:
        raise UsageError(
            f"there is no column {chat.column!r} in {table.source}",
            where="task.chat.column",
            fix=suggest(chat.column, names),
        )
    if chat.column is not None and chat.kind not in ("auto", "messages"):
        raise UsageError(
            f"kind {chat.kind} has its own columns: {', '.join(KINDS[chat.kind])}",
            where="task.chat.column",
        )
    found = {name: "messages" for name in _MESSAGE_COLUMNS if name in names}
    if chat.column is not None:
        found = {chat.column: "messages"}
    else:
        for kind, columns in KINDS.items():
            if all(name in names for name in columns):
                found[" and ".join(columns)] = kind
    if chat.kind != "auto":
        found = {name: kind for name, kind in found.items() if kind == chat.kind}
    if len(found) != 1:
        raise _ambiguous_columns(table, list(found))
    name, kind = next(iter(found.items()))
    if kind == "prompt_completion" and chat.kind == "auto" and "label" in names:
        _refuse_preferences(table)
    return RowReader(table, kind, name)


def _refuse_preferences(table: Table) -> None:
    """Refuse completions with a true or false label."""
    if all(isinstance(label, bool) for label in table.columns["label"]):
        raise DataError(
            "the label column says which completions are good: this is preference data, and every "
            "completion would be learnt",
            where=table.source,
            fix="remove the rows that must not be learnt, then the column; or set "
            "task.chat.kind=prompt_completion, which learns every row",
        )


def _ambiguous_columns(table: Table, found: list[str]) -> UsageError:
    if found:
        return UsageError(
            f"{table.source} has {' as well as '.join(found)}",
            where="task.chat.kind",
            fix="choose by task.chat.kind (messages, prompt_completion, instruction) or by "
            "task.chat.column",
        )
    if all(name in table.columns for name in _PREFERENCE_COLUMNS):
        return UsageError(
            f"{table.source} is preference data (chosen and rejected answers), which this task "
            "does not learn from",
            where="task.path",
            fix="task.chat.column=chosen learns the chosen answers if they are lists of messages",
        )
    return UsageError(
        f"no conversation among the columns of {table.source}: {', '.join(table.columns)}",
        where="task.chat.column",
        fix=f"{' or '.join(_MESSAGE_COLUMNS)} (a list of messages), prompt and completion, "
        "instruction, input and output; or name the column of messages by task.chat.column",
    )


def _by_source(
    parts: Mapping[str, list[Conversation]], counts: dict[str, int], notes: list[str]
) -> RawChat:
    """Keep the split of the source. Prompts that both sides share are only noted."""
    prompts = {each.group for each in parts["train"]}
    shared = sum(each.group in prompts for each in parts["validation"])
    if shared:
        notes = [*notes, f"{shared} validation rows open with a prompt that training has too"]
    train, validation = (
        [replace(each, group=each.place) for each in parts[name]]
        for name in ("train", "validation")
    )
    return RawChat(train, validation, "rows", counts, notes)
