"""An export's folder stands whole or not at all, and what others keep beside it stays theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.export.place import free_folder
from sparsegrad_cli.export.writing import write_export

Fill = Callable[[Path], None]
RECORD = '{"to": "merged"}'


def filled(text: str) -> Fill:
    def fill(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "export.json").write_text(RECORD)

    return fill


def export(folder: Path, fill: Fill, *, overwrite: bool = False) -> None:
    write_export(free_folder(folder, [], overwrite=overwrite), fill, overwrite=overwrite)


def tree(folder: Path) -> dict[str, str]:
    """Files by name, with their content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


class Killed(BaseException):
    """The end of the process: nothing runs after it."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``kill(folder, fill, at=2)``: an export with --overwrite, killed before that rename."""

    def killed(folder: Path, fill: Fill, *, at: int) -> None:
        real, calls = Path.replace, [0]

        def replace(source: Path, target: Path) -> Path:
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return real(source, target)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "replace", replace)
            patched.setattr("sparsegrad_cli.export.writing.clear_work", lambda folder: None)
            export(folder, fill, overwrite=True)

    return killed


def test_what_was_set_aside_by_hand_is_kept(tmp_path: Path) -> None:
    folder, kept = tmp_path / "e", tmp_path / "e.before"
    export(folder, filled("a"))
    folder.replace(kept)
    export(folder, filled("b"))
    export(folder, filled("c"), overwrite=True)
    assert tree(kept) == {"weights": "a", "export.json": RECORD}
    assert tree(folder) == {"weights": "c", "export.json": RECORD}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "e.before"]


@pytest.mark.parametrize("what", ["an export", "notes", "a file", "a link", "a link to nothing"])
def test_somebody_elses_partial_is_refused(tmp_path: Path, what: str) -> None:
    folder, other = tmp_path / "e", tmp_path / "e.partial"
    if what == "an export":
        export(folder, filled("a"))
        folder.replace(other)
    elif what == "notes":
        other.mkdir()
        (other / "new").write_text("mine")
    elif what == "a file":
        other.write_text("mine")
    else:
        other.symlink_to(tmp_path / "elsewhere")
    if what == "a link":
        (tmp_path / "elsewhere").mkdir()
    there = sorted(tmp_path.iterdir()), tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="something else of that name"):
            export(folder, filled("b"), overwrite=overwrite)
        with pytest.raises(UsageError, match="something else of that name"):  # come since one saw
            write_export(folder, filled("b"), overwrite=overwrite)
    assert (sorted(tmp_path.iterdir()), tree(tmp_path)) == there


def test_what_came_to_stand_there_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    export(folder, lambda new: None)  # an empty folder is free
    with pytest.raises(UsageError, match="not empty"):
        export(folder, lambda new: filled("mine")(folder))
    assert tree(tmp_path) == {"e/weights": "mine", "e/export.json": RECORD}


@pytest.mark.parametrize(("at", "stays"), [(1, "a"), (2, None)])
def test_a_killed_replacement_is_undone(
    tmp_path: Path, kill: Callable[..., None], at: int, stays: str | None
) -> None:
    """Before its first rename, and between the two."""
    folder = tmp_path / "e"
    export(folder, filled("a"))
    kill(folder, filled("b"), at=at)
    assert tree(folder).get("weights") == stays
    with pytest.raises(UsageError, match="not empty"):  # it is back, and --overwrite not given
        export(folder, filled("c"))
    assert tree(folder) == {"weights": "a", "export.json": RECORD}
    export(folder, filled("c"), overwrite=True)
    assert tree(tmp_path) == {"e/weights": "c", "e/export.json": RECORD}


def test_what_a_killed_export_left_is_in_nobodys_way(
    tmp_path: Path, kill: Callable[..., None]
) -> None:
    folder = tmp_path / "e"
    kill(folder, filled("a"), at=1)
    assert not folder.exists() and (tmp_path / "e.partial" / "new" / "weights").exists()
    export(folder, filled("b"))
    (tmp_path / "f.partial").mkdir()  # killed before it was marked
    export(tmp_path / "f", filled("b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "f"]


@pytest.mark.parametrize("failure", [OSError("no room"), KeyboardInterrupt()])
def test_a_failing_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    folder = tmp_path / "e"
    export(folder, filled("a"))
    real = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise failure
        return real(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises((DiskError, KeyboardInterrupt)):
        export(folder, filled("b"), overwrite=True)
    assert tree(tmp_path) == {"e/weights": "a", "e/export.json": RECORD}
