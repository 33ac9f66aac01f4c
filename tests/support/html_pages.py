"""Parse HTML pages into text, ids, tags and references, and render pages without figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from html.parser import HTMLParser
from unittest.mock import patch

from support.paths import REPO

VOID = {"meta", "br", "use", "image", "path", "line", "rect", "hr", "img", "link"}


class Outline(HTMLParser):
    """Parser that checks the order of tags and collects text, ids and references."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.attributes |= values.keys()
        self.ids += [str(values["id"])] if values.get("id") else []
        self.refers += [str(values[k]) for k in ("href", "src", "xlink:href") if values.get(k)]


def outline(page: str) -> Outline:
    """Parse a page without the script that sorts its tables, which is the same on every page."""
    script = (REPO / "sparsegrad_cli/report/templates/sort.js").read_text(encoding="utf-8")
    own = f"<script>\n{script}</script>"
    assert page.count(own) == 1
    parser = Outline()
    parser.feed(page.replace(own, ""))
    assert not parser.open
    return parser


@contextlib.contextmanager
def without_figures(*, drawing: bool = True, figures: bool = True) -> Iterator[None]:
    """Skip the drawing of figures, or also their construction, which takes long in matplotlib."""
    with contextlib.ExitStack() as changes:
        if not drawing:
            there = "sparsegrad_cli.report.svg.to_svg"
            changes.enter_context(patch(there, lambda figure: "<svg></svg>"))
        if not figures:
            there = "sparsegrad_cli.report.study.ChartCache.draw"
            changes.enter_context(patch(there, lambda *_: None))
        yield
