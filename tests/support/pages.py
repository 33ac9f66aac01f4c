"""Code blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every code block of a page; the language may be empty."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[list[str]]:
    """Yield the arguments of every ``sparsegrad`` in a code block."""
    for line in block.replace("\\\n", " ").splitlines():
        if found := re.match(r"(?:\$ )?sparsegrad +(?!\[OPTIONS\])(.*)", line):
            yield shlex.split(found[1], comments=True)
