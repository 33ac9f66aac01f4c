"""Render pages in Chromium: screenshots, layout measurements and PDF page counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # offline: no name resolves
)


class Browser:
    """Headless Chromium.

    Args:
        program: path of the executable.
        folder: folder for profiles and screenshots.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder

    def _run(self, *flags: str) -> str:
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        profile = f"--user-data-dir={self._folder / 'profile'}"
        done = subprocess.run(
            [self._program, *_FLAGS, *root, profile, *flags],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

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

    def measure(self, page: Path, width: int) -> dict[str, float]:
        """Measure the page in a frame of ``width`` pixels.

        Returns:
            ``content``: the document's scroll width; ``outside``: elements that reach beyond the
            frame and are not in a scrolling box; ``text``: the smallest text of any drawing, in
            pixels of the screen.
        """
        frame = self._folder / f"{page.stem}-frame.html"
        frame.write_text(
            f'<iframe id="f" src="{page.as_uri()}" width="{width}" height="900" '
            'style="border:0"></iframe><pre id="out"></pre><script>' + _MEASURE + "</script>",
            encoding="utf-8",
        )
        shown = self._run("--virtual-time-budget=20000", "--dump-dom", frame.as_uri())
        found = re.search(r"content=(\d+) outside=(\d+) text=([\d.]+)", shown)
        assert found, shown[-500:]
        return dict(zip(("content", "outside", "text"), map(float, found.groups()), strict=True))

    def pdf_pages(self, page: Path) -> int:
        """Return the number of pages when printed."""
        target = self._folder / f"{page.stem}.pdf"
        self._run("--no-pdf-header-footer", f"--print-to-pdf={target}", page.as_uri())
        return len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))


_MEASURE = """
document.getElementById("f").onload = () => {
  const doc = document.getElementById("f").contentDocument, root = doc.documentElement;
  const style = e => doc.defaultView.getComputedStyle(e);
  const scrolls = e => {
    for (; e; e = e.parentElement)
      if (["auto", "scroll"].includes(style(e).overflowX)) return true;
  };
  let outside = 0, text = 99;
  for (const e of doc.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > root.clientWidth + 1 && !scrolls(e)) outside++;
    if (e.tagName == "text" && box.width) {
      const drawn = e.ownerSVGElement.getScreenCTM().a;
      text = Math.min(text, drawn * parseFloat(style(e).fontSize));
    }
  }
  document.getElementById("out").textContent =
    `content=${root.scrollWidth} outside=${outside} text=${text.toFixed(2)}`;
};
"""


def find_browser(folder: Path) -> Browser:
    """Return Chromium, or skip the test if it is not installed."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed (one of {', '.join(_NAMES)})")
    return Browser(program, folder)
