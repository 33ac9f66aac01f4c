"""Export folders are written atomically, and the user's files beside them are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.export.output_folder import check_output_folder, write_export

Fill = Callable[[Path], None]
RECORD = '{"to": "merged"}'


def filled(text: str) -> Fill:
    def fill(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "export.json").write_text(RECORD)

    return fill


def export(folder: Path, fill: Fill, *, overwrite: bool = False) -> None:
    checked = check_output_folder(folder, [], overwrite=overwrite)
    write_export(checked, fill, overwrite=overwrite)


def tree(folder: Path) -> dict[str, str]:
    """Return the content of every file by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"deeper cannot be made: .*file cannot be written"):
        check_output_folder(tmp_path / "file" / "deeper", [], overwrite=True)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for folder in (tmp_path / "new", tmp_path / "a" / "new"):
        with pytest.raises(DiskError, match=f"new cannot be made: {tmp_path} cannot be written"):
            check_output_folder(folder, [], overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_error_of_a_write_quotes_no_temporary_name(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights" / "deeper").write_text("there is no such folder")

    with pytest.raises(DiskError) as caught:
        write_export(tmp_path / "m", fill, overwrite=False)
    assert caught.value.what == "m could not be written: No such file or directory"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``kill(folder, fill, at=2)`` runs an export with --overwrite and kills it at that rename."""

    def killed(folder: Path, fill: Fill, *, at: int) -> None:
        real, calls = Path.replace, [0]

        def replace(source: Path, target: Path) -> Path:
            calls[0] += 1
            if calls[0] >= at:
                raise Killed
            return real(source, target)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "replace", replace)
            patched.setattr("sparsegrad_cli.io.atomic.discard", lambda path: None)
            export(folder, fill, overwrite=True)

    return killed


@pytest.mark.parametrize("name", ["e.before", "e.partial", "e.removed"])
def test_user_folders_beside_an_export_are_kept(tmp_path: Path, name: str) -> None:
    folder, kept = tmp_path / "e", tmp_path / name
    export(folder, filled("a"))
    folder.replace(kept)
    export(folder, filled("b"))
    export(folder, filled("c"), overwrite=True)
    assert tree(kept) == {"weights": "a", "export.json": RECORD}
    assert tree(folder) == {"weights": "c", "export.json": RECORD}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", name]


def test_files_that_appear_during_an_export_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    export(folder, lambda new: None)  # an empty folder may be written to
    with pytest.raises(UsageError, match="not empty"):
        export(folder, lambda new: filled("mine")(folder))
    assert tree(tmp_path) == {"e/weights": "mine", "e/export.json": RECORD}


@pytest.mark.parametrize(("at", "stays"), [(1, "a"), (2, None)])
def test_killed_replacement_is_undone(
    tmp_path: Path, kill: Callable[..., None], at: int, stays: str | None
) -> None:
    """Kill the process before the first rename, and between the two."""
    folder = tmp_path / "e"
    export(folder, filled("a"))
    kill(folder, filled("b"), at=at)
    assert tree(folder).get("weights") == stays
    with pytest.raises(UsageError, match="not empty"):  # restored, and --overwrite is not given
        export(folder, filled("c"))
    assert tree(folder) == {"weights": "a", "export.json": RECORD}
    export(folder, filled("c"), overwrite=True)
    assert tree(tmp_path) == {"e/weights": "c", "e/export.json": RECORD}


def test_export_after_a_killed_export_succeeds(tmp_path: Path, kill: Callable[..., None]) -> None:
    folder = tmp_path / "e"
    kill(folder, filled("a"), at=1)
    assert not folder.exists() and list(tmp_path.rglob("weights"))
    export(folder, filled("b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


@pytest.mark.parametrize("failure", [OSError("no room"), KeyboardInterrupt()])
def test_failed_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    folder = tmp_path / "e"
    export(folder, filled("a"))
    real = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise failure
        return real(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises((DiskError, KeyboardInterrupt)):
        export(folder, filled("b"), overwrite=True)
    assert tree(tmp_path) == {"e/weights": "a", "e/export.json": RECORD}
