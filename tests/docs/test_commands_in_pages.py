"""The commands that README and the documentation show exist, with their options."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from support.pages import blocks, commands
from support.paths import REPO

from sparsegrad_cli.cli.app import app

PAGES = [
    page
    for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]
    if page.name != "LOG.md" and page.parent.name != "results"
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_commands_parse(page: Path) -> None:
    program = typer.main.get_command(app)
    found = [command for _, block in blocks(page) for command in commands(block)]
    for name, *arguments in found:
        if name == "COMMAND" or name.startswith("--") or {"[OPTIONS]", "--help"} & {*arguments}:
            continue  # a usage line, or help
        command = program.commands[name]  # type: ignore[attr-defined]
        if name == "configs" and arguments:
            command = command.commands[arguments.pop(0)]
        assert command.make_context(f"sparsegrad {name}", arguments).command is command
