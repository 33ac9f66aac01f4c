"""The commands that README and the documentation show exist, with their options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from support.paths import REPO

from sparsegrad_cli.cli.app import app

PAGES = [
    page
    for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]
    if page.name != "LOG.md" and page.parent.name != "results"
]
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every ``sparsegrad`` in the code blocks of a page."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:\$ )?sparsegrad +(?!\[OPTIONS\])(.*)", line):
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_commands_parse(page: Path) -> None:
    program = typer.main.get_command(app)
    for name, *arguments in commands(page):
        if name == "COMMAND" or name.startswith("--") or {"[OPTIONS]", "--help"} & {*arguments}:
            continue  # a usage line, or help
        command = program.commands[name]  # type: ignore[attr-defined]
        if name == "configs" and arguments:
            command = command.commands[arguments.pop(0)]
        assert command.make_context(f"sparsegrad {name}", arguments).command is command
