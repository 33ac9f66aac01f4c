"""Exports are pushed to a server that speaks the hub's API, by the real huggingface_hub."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from support.cli_runs import Cli
from support.hub_server import TOKEN, Hub, Repository, hub_server
from support.paths import REPO
from support.small_runs import base_of, record

from sparsegrad_cli.errors import UploadError
from sparsegrad_cli.export.hub_upload import refuse_local_paths

Runs = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub, and make the client of this process use it, without Xet storage."""
    constants = huggingface_hub.constants
    with hub_server() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def local_texts(run: Path) -> list[str]:
    """Return what must be in no uploaded file: paths of this machine, and texts of the data."""
    data = Path(yaml.safe_load((run / "recipe.yaml").read_text())["task"]["path"])
    rows = [
        row["text"]
        for name in ("train", "validation")
        for row in csv.DictReader((data / f"{name}.csv").open(encoding="utf-8"))
    ]
    paths = [run, run.parent, Path.cwd(), Path.home(), Path(base_of(run)), data]
    return [*map(str, paths), *(text for text in rows if len(text) > 4)]


@pytest.mark.parametrize("form", ["merged", "lora", "adapter"])
def test_pushed_files_are_private_and_hold_neither_paths_nor_data(
    form: str, runs: Runs, cli: Cli, hub: Hub, tmp_path: Path
) -> None:
    run = shutil.copytree(runs("method=lora"), tmp_path / "secret run")
    for report in ("report.html", "report.md"):  # They name the folder of the run.
        (run / report).write_text(str(run))
    folder = run / f"export-{form}"
    told = cli("export", str(run), "--to", form, "--push-to-hub", "me/tiny")
    assert told.code == 0, told.err
    pushed = hub.repositories["me/tiny"]
    assert pushed.private and pushed.commits == 1
    assert set(pushed.files) == {p.name for p in folder.iterdir()} | {".gitattributes"}
    for name, content in pushed.files.items():
        assert f"note: {name}, " in told.err or name == ".gitattributes"
        for text in local_texts(run):
            assert text.encode() not in content, (name, text)
    assert told.err.index("upload: ") < told.err.index("note: README.md")
    assert f"{hub.url}/me/tiny" in told.out and "private" in told.out
    for name in pushed.files:
        if name.endswith(".safetensors"):
            assert pushed.files[name] == (folder / name).read_bytes()
    card = pushed.files["README.md"].decode()
    assert '"me/tiny"' in card and '"."' not in card
    # The folder keeps the path of its base model, by which it is loaded here.
    if form == "lora":
        ours = json.loads((folder / "adapter_config.json").read_text())
        assert ours["base_model_name_or_path"] == base_of(run)
        theirs = json.loads(pushed.files["adapter_config.json"])
        assert theirs == ours | {"base_model_name_or_path": "bert"}


def test_push_again_needs_overwrite_and_replaces_all_files(
    runs: Runs, cli: Cli, hub: Hub, tmp_path: Path
) -> None:
    def push(*options: str) -> Any:
        place = ("-o", str(tmp_path / "out"), "--push-to-hub", "me/tiny")
        return cli("export", str(runs("method=lora")), *place, *options)

    assert push("--to", "lora", "--public").code == 0
    assert not hub.repositories["me/tiny"].private
    told = push("--to", "merged")
    assert told.code == 2 and "is not empty" in told.flat
    told = push("--to", "merged", "--overwrite")
    assert told.code == 1 and "to be private, and it is public" in told.flat
    (tmp_path / "out").rename(tmp_path / "old")
    told = push("--to", "merged", "--public")
    assert told.code == 1 and "exists and holds an export" in told.flat
    assert "--overwrite replaces it" in told.flat and not (tmp_path / "out").exists()
    assert push("--to", "merged", "--public", "--overwrite").code == 0
    files = hub.repositories["me/tiny"].files
    assert "adapter_config.json" not in files and "model.safetensors" in files


@pytest.mark.parametrize(
    ("problem", "words", "code"),
    [
        ("no token", "hf auth login, or set HF_TOKEN", 2),
        ("wrong token", "the hub does not accept the token", 1),
        ("offline", "unset HF_HUB_OFFLINE", 1),
        ("no server", "check the connection and HF_ENDPOINT", 1),
        ("other files", "holds something other than an export", 1),
        ("bad name", "expected OWNER/NAME, got 'tiny'", 2),
    ],
)
def test_refusals_come_before_the_export(
    problem: str,
    words: str,
    code: int,
    runs: Runs,
    refused: Callable[..., Any],
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    name, constants = "me/tiny", huggingface_hub.constants
    if problem == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif problem == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif problem == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif problem == "no server":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif problem == "other files":
        hub.repositories[name] = Repository(private=True, files={"notes.md": b"mine"})
    else:
        name = "tiny"
    told = refused(code, runs("method=lora"), "--to", "lora", "--push-to-hub", name)
    assert words in told.flat and "hf_wrong" not in told.err
    assert not any("commit" in request for request in hub.requests)


def test_public_without_push_is_refused(runs: Runs, refused: Callable[..., Any]) -> None:
    told = refused(2, runs("method=lora"), "--to", "lora", "--public")
    assert "--public needs --push-to-hub" in told.flat


def test_failed_upload_keeps_the_export_and_can_be_repeated(
    runs: Runs, cli: Cli, hub: Hub, tmp_path: Path
) -> None:
    run, folder = runs("method=lora"), tmp_path / "out"
    command = ("export", str(run), "--to", "lora", "-o", str(folder), "--push-to-hub")
    told = cli(*command, "others/tiny")
    assert told.code == 1 and "the token may not write to others/tiny" in told.flat
    assert f"the export is complete in {folder}" in told.flat and (folder / "export.json").exists()
    hub.refuse["/commit/main"] = 500
    told = cli(*command, "me/tiny", "--overwrite")
    assert told.code == 1 and "HTTP 500" in told.flat and (folder / "export.json").exists()
    hub.refuse.clear()
    assert cli(*command, "me/tiny", "--overwrite").code == 0  # The repository was empty.
    assert "adapter_model.safetensors" in hub.repositories["me/tiny"].files


def test_a_path_in_any_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m\u00fcller"
    escaped = json.dumps({"path": str(folder)}).encode()
    for files in ({"a.json": str(folder).encode()}, {"a.json": escaped}):
        with pytest.raises(UploadError, match="holds"):
            refuse_local_paths(files, [folder])
    home = f"{Path.home()}/x".encode()
    with pytest.raises(UploadError, match=r"a\.txt holds"):
        refuse_local_paths({"a.txt": home}, [])
    refuse_local_paths({"tokenizer.json": home, "b.json": b"/elsewhere/x"}, [folder])


@pytest.mark.slow
def test_pushed_model_is_downloaded_and_used_in_another_process(
    runs: Runs, hub: Hub, tmp_path: Path
) -> None:
    """HF_ENDPOINT and HF_TOKEN are all that the command line needs; the card's code then works."""
    run = runs("method=lora")
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {
        "PYTHONPATH": str(REPO),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = ("-m", "sparsegrad_cli", "export", str(run), "--to", "merged", "--json")
    ended = subprocess.run(
        [sys.executable, *command, "-o", "out", "--push-to-hub", "me/tiny"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)["hub"]
    assert said["repository"] == "me/tiny" and not said["public"]
    files = hub.repositories["me/tiny"].files
    assert said["files"] == {n: len(c) for n, c in files.items() if n != ".gitattributes"}
    assert TOKEN not in (tmp_path / "out" / "export.json").read_text() + ended.stdout
    # The card's code, with a download in the place of the repository's name.
    place = tmp_path / "downloaded"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    card = files["README.md"].decode().replace("me/tiny", str(place))
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, names)
    found = names["pipe"](["abc"])[0]
    assert found["label"] in ("high", "low")
    assert names["model"].config.id2label == {0: "high", 1: "low"}
    assert record(run)["status"] == "done"
