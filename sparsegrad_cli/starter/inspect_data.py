"""Look at a file or folder of data, and decide which task it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.chat_rows import KINDS
from sparsegrad_cli.data.labelled_files import load_labelled_files
from sparsegrad_cli.data.load_task import load_chat
from sparsegrad_cli.data.read_table import read_table
from sparsegrad_cli.data.split_files import SUFFIXES, SUFFIXES_OF, split_files
from sparsegrad_cli.data.tables import Table
from sparsegrad_cli.data.text_files import uncompressed_name
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.recipe.task_section import ColumnsSection, TaskSection
from sparsegrad_cli.starter.columns import (
    ColumnFacts,
    describe_columns,
    flag_columns,
    label_candidates,
    pair_in,
    text_candidates,
)

# Asks the user which of several columns is meant; None takes the first.
Ask = Callable[[str, Sequence[ColumnFacts]], str] | None
_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_SEPARATORS = (";", "|", ",")  # Of several labels in a cell.
_UNBALANCED = 4  # Times as many rows in the most frequent class as in the rarest.
_FEW_ROWS = 10  # A note follows for a class with fewer training rows.
_LENGTH_SAMPLE = 1000  # Rows whose tokens are counted.


@dataclass
class FoundData:
    """What the data is.

    Attributes:
        path: the file or folder.
        task: name of the task in a recipe: ``csv``, ``json``, ``parquet`` or ``chat``.
        rows: rows of the files to train on, before a validation part is split off.
        validation_rows: rows of the files' own validation part; 0 if there is none.
        columns: all columns.
        text, text_pair, label: the columns that were chosen; None for conversations.
        labels: columns of 0 and 1, one for each of several labels a row, in place of ``label``.
        multilabel: whether a row may have several labels.
        label_separator: text between several labels in a cell; None if cells are lists or flags.
        classes: class -> training rows, the most frequent first; empty for scores.
        scores: (lowest, highest) of scores.
        sample: texts of the first rows, whose tokens are counted.
        notes: what the user should know.
    """

    path: Path
    task: str
    rows: int
    validation_rows: int = 0
    columns: list[ColumnFacts] = field(default_factory=list)
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: list[str] = field(default_factory=list)
    multilabel: bool = False
    label_separator: str | None = None
    classes: dict[str, int] = field(default_factory=dict)
    scores: tuple[float, float] | None = None
    sample: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        """Whether the rows are conversations."""
        return self.task == "chat"

    @property
    def majority(self) -> float:
        """Share of the most frequent class; 0 for scores, several labels and conversations."""
        if not self.classes or self.multilabel:
            return 0.0
        return max(self.classes.values()) / sum(self.classes.values())

    @property
    def unbalanced(self) -> bool:
        """Whether the rarest class or label has far fewer rows than the most frequent one."""
        counts = self.classes.values()
        return bool(counts) and max(counts) > _UNBALANCED * min(counts)


@dataclass(frozen=True)
class Choices:
    """Columns that the user has named.

    Attributes:
        text, text_pair, label: names; None leaves the choice to the data.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def inspect_data(path: Path, choices: Choices, ask: Ask = None) -> FoundData:
    """Read the files of a path and decide what they are.

    Args:
        path: a file, or a folder with train and validation files.
        choices: columns that the user has named.
        ask: asks where several columns fit equally well.

    Raises:
        UsageError: a named column is missing, or no column fits.
        DataError: a file cannot be read, or its rows are not usable.
    """
    files = split_files(path, SUFFIXES)
    train = read_table(files.train)
    validation = read_table(files.validation) if files.validation else None
    notes = [*files.notes, *train.notes]
    if _is_chat(train):
        chat = load_chat(TaskSection(name="chat", path=str(path)))
        own = validation is not None
        rows = len(chat.train) if own else len(chat.train) + len(chat.validation)
        held_out = len(chat.validation) if own else 0
        return FoundData(path, "chat", rows, held_out, notes=list(chat.notes))
    found = FoundData(path, _task_of(files.train[0]), len(train), notes=notes)
    found.validation_rows = len(validation) if validation else 0
    found.columns = describe_columns(train)
    _choose(found, choices, ask)
    if found.label is not None:
        _find_separator(found, train.columns[found.label])
    _read_labels(found)
    return found


def _is_chat(table: Table) -> bool:
    names = set(table.columns)
    if names & {"chosen", "rejected"} == {"chosen", "rejected"}:
        raise UsageError(
            f"{table.source} holds preferred and rejected answers, which no task here reads",
            where="command line",
            fix="keep the chosen answers, as messages or as prompt and completion",
        )
    turns = any(
        name in names and all(isinstance(value, list) for value in table.columns[name][:100])
        for name in _TURNS
    )
    return turns or any(set(columns) <= names for columns in KINDS.values())


def _task_of(file: Path) -> str:
    suffix = Path(uncompressed_name(file)).suffix
    return next(task for task, suffixes in SUFFIXES_OF.items() if suffix in suffixes)


def _choose(found: FoundData, choices: Choices, ask: Ask) -> None:
    """Choose the columns of texts and label."""
    names = [column.name for column in found.columns]
    for option, name in (
        ("--label-column", choices.label),
        ("--text-column", choices.text),
        ("--text-pair-column", choices.text_pair),
    ):
        if name is not None and name not in names:
            fix = f"one of {listed(names)}"
            raise UsageError(f"the data has no column {name!r}", where=option, fix=fix)
    free = [c for c in found.columns if c.name not in (choices.text, choices.text_pair)]
    flags = [] if choices.label else flag_columns(free)
    if flags:
        found.labels = [column.name for column in flags]
        found.notes.append(
            f"columns of 0 and 1 are taken as labels, of which a row may have several: "
            f"{listed(found.labels, 10)}; --label-column NAME takes one column alone"
        )
    else:
        found.label = choices.label or _one_of(found, "label", free, ask)
    free = [c for c in found.columns if c.name not in (found.label, *found.labels)]
    pair = pair_in(free)
    if choices.text is None and choices.text_pair is None and pair is not None:
        found.text, found.text_pair = pair
        return
    found.text = choices.text or _one_of(found, "text", free, ask)
    found.text_pair = choices.text_pair


def _one_of(found: FoundData, what: str, free: list[ColumnFacts], ask: Ask) -> str:
    """Return the likeliest free column; ask, or leave a note, where another fits as well."""
    option = f"--{what}-column"
    candidates = label_candidates(free) if what == "label" else text_candidates(free)
    if not candidates:
        raise UsageError(
            f"found no column for the {what} in {found.path}",
            where="command line",
            fix=_no_column_fix(option, free),
        )
    named = [c for c in candidates if (c.named_label if what == "label" else c.named_text)]
    if len(named) == 1 or len(candidates) == 1:
        return (named or candidates)[0].name
    rivals = named or candidates
    if ask is not None:
        return ask(what, rivals)
    others = listed([column.name for column in rivals[1:]])
    found.notes.append(f"{rivals[0].name} is taken as the {what}; {option} chooses {others}")
    return rivals[0].name


def _no_column_fix(option: str, free: list[ColumnFacts]) -> str:
    """Return what to do if no column fits: name one whose cells could, or unpack those of JSON."""
    plain = [column.name for column in free if column.plain]
    nested = [column.name for column in free if column.kind == "object"]
    parts = [f"name it: {option} NAME; columns: {listed(plain)}"] if plain else []
    if nested:
        holds = "holds" if len(nested) == 1 else "hold"
        advice = "write the field that is meant as a column of its own"
        parts.append(f"{listed(nested)} {holds} objects: {advice}")
    return "; ".join(parts) or "add a column of texts, and one of labels"


def _find_separator(found: FoundData, values: Sequence[Any]) -> None:
    """Read cells as several labels each if some are empty, and others divide into the same parts.

    Without an empty cell they may as well be classes with long names, and a note will do.
    """
    texts = [value.strip() for value in values if isinstance(value, str)]
    empty = len(values) - sum(map(bool, texts))
    if not empty or not texts:
        return
    found.label_separator = _separator_in(sorted(set(filter(None, texts))))
    if found.label_separator is not None:
        example = next(text for text in texts if found.label_separator in text)
        found.notes.append(
            f"{example!r:.60} is read as several labels, and an empty cell ({empty:,} of "
            f"{len(values):,}) as none (task.type: multilabel, task.label_separator: "
            f"{found.label_separator!r})"
        )


def _separator_in(names: Sequence[str]) -> str | None:
    """Return a separator that divides the names of classes into fewer different parts, or None."""
    for separator in _SEPARATORS:
        parts = {part.strip() for name in names for part in name.split(separator)}
        if 1 < len(parts) < len(names) and any(separator in name for name in names):
            return separator
    return None


def _read_labels(found: FoundData) -> None:
    """Read texts and labels as training will, and describe them."""
    kinds = {column.name: column.kind for column in found.columns}
    lists = kinds.get(str(found.label)) == "labels"
    found.multilabel = bool(found.labels or found.label_separator) or lists
    columns = ColumnsSection(
        text=found.text,
        text_pair=found.text_pair,
        label=found.label,
        labels=tuple(found.labels) or None,
    )
    task = TaskSection(
        name=found.task,
        path=str(found.path),
        columns=columns,
        type="multilabel" if found.multilabel else None,
        label_separator=found.label_separator,
    )
    raw = load_labelled_files(task)
    known = [*found.notes]
    found.notes += [
        note
        for note in raw.notes
        if note not in known and not note.startswith("columns that are not used")
    ]
    pairs = raw.train.text_pair
    for at in range(min(len(raw.train), _LENGTH_SAMPLE)):
        texts: tuple[Any, ...] = (raw.train.text[at],)
        found.sample.append((*texts, pairs[at]) if pairs is not None else texts)
    if raw.spec.label_names is None:
        values = [float(value) for value in raw.train.label]
        found.scores = (min(values), max(values))
        return
    names = raw.spec.label_names
    if found.multilabel:
        sums = [int(sum(column)) for column in zip(*raw.train.label, strict=True)]
        counts = Counter(dict(enumerate(sums)))
    else:
        counts = Counter(raw.train.label)
    found.classes = {names[int(label)]: count for label, count in counts.most_common()}
    if found.label in found.classes:
        found.notes.append(
            f"column {found.label!r} holds its own name as a label: if the file has no header, its "
            "first row is lost; add one"
        )
    separator = None if found.multilabel else _separator_in(names)
    if separator is not None:
        example = next(name for name in names if separator in name)
        found.notes.append(
            f"labels such as {example!r:.60} may be several: task.type: multilabel with "
            f"task.label_separator: {separator!r} learns them one by one"
        )
    rare = [name for name, count in found.classes.items() if count < _FEW_ROWS]
    if rare:
        what = "labels" if found.multilabel else "classes"
        found.notes.append(f"{what} with fewer than {_FEW_ROWS} training rows: {listed(rare)}")
    if not found.multilabel and len(found.classes) > len(raw.train) / 3:
        raise DataError(
            f"column {found.label!r} has {len(found.classes)} classes in {len(raw.train)} rows: it "
            "does not look like a label",
            where=str(found.path),
            fix="--label-column NAME",
        )
