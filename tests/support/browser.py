"""Render pages in Chromium: screenshots, measurements of the layout, and PDF page counts."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.paths import REPO

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # offline: no name resolves
)
_CONSOLE = re.compile(r":CONSOLE[:(]\d+\)?\]? (.*)")


class Browser:
    """Headless Chromium.

    Args:
        program: path of the executable.
        folder: folder for profiles and screenshots.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder

    def _run(self, *flags: str) -> tuple[str, list[str]]:
        """Run it to the end; return its output and the messages on the console."""
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        profile = f"--user-data-dir={self._folder / 'profile'}"
        done = subprocess.run(
            [self._program, *_FLAGS, *root, profile, *flags],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout, _CONSOLE.findall(done.stderr)

    def picture(self, page: Path, width: int, height: int, *, dark: bool) -> np.ndarray:
        """Return a screenshot of the window, (height, width, 3) float64 in [0, 1]."""
        from matplotlib.image import imread

        target = self._folder / f"{page.stem}-{width}-{'dark' if dark else 'light'}.png"
        self._run(
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width},{height}",
            f"--screenshot={target}",
            page.as_uri(),
        )
        pixels: np.ndarray = np.asarray(imread(target), dtype=np.float64)[:, :, :3]
        return pixels

    def measure(
        self, page: Path, width: int, *, dark: bool = False, paper: bool = False
    ) -> dict[str, Any]:
        """Measure the page in a frame of ``width`` pixels.

        Args:
            page: the file.
            width: of the frame.
            dark: whether the reader prefers a dark page.
            paper: whether the rules for printing apply.

        Returns:
            What tests/support/measure_page.js describes, and ``console``: its messages.
        """
        script = (REPO / "tests" / "support" / "measure_page.js").read_text(encoding="utf-8")
        frame = self._folder / f"{page.stem}-frame.html"
        frame.write_text(
            f'<iframe id="f" src="{page.as_uri()}" width="{width}" height="900" '
            f'style="border:0"></iframe><pre id="out"></pre><script>const paper = '
            f"{'true' if paper else 'false'};\n{script}</script>",
            encoding="utf-8",
        )
        shown, console = self._run(
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=20000",
            "--dump-dom",
            frame.as_uri(),
        )
        found = re.search(r'<pre id="out">(\{.*?\})</pre>', shown, re.DOTALL)
        assert found, (shown[-500:], console)
        measured: dict[str, Any] = json.loads(html.unescape(found[1]))
        return measured | {"console": console}

    def pdf_pages(self, page: Path) -> int:
        """Return the number of pages when printed."""
        target = self._folder / f"{page.stem}.pdf"
        self._run("--no-pdf-header-footer", f"--print-to-pdf={target}", page.as_uri())
        return len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))


def find_browser(folder: Path) -> Browser:
    """Return Chromium, or skip the test if it is not installed."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed (one of {', '.join(_NAMES)})")
    return Browser(program, folder)
