"""Write the reference of the commands from their help texts, with Typer's own generator."""

from __future__ import annotations

import html
import re
import subprocess
import sys

_INTRODUCTION = """# Commands

Every command has `--help`. This page is generated from the help texts; do not edit it
(`make reference` writes it again).
"""


def page() -> str:
    """Return the page as Markdown."""
    generator = ["typer", "sparsegrad_cli.cli.app", "utils", "docs", "--name", "sparsegrad"]
    done = subprocess.run(
        [sys.executable, "-m", *generator], check=True, capture_output=True, text=True
    )
    body = html.unescape(done.stdout).partition("\n")[2]
    examples = re.compile(r'(?:<span style="font-weight: bold">[^<]*</span>\n?)+')
    return _INTRODUCTION + examples.sub(_example, body).rstrip() + "\n"


def _example(found: re.Match[str]) -> str:
    commands = re.sub(r"</?span[^>]*>", "", found[0]).rstrip()
    commands = re.sub(r"\n(?!sparsegrad)", r" \\\n    ", commands)  # a command of several lines
    return f"```console\n{commands}\n```\n"
