"""Strategies for hostile text and records, and checks that documents render them safely."""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from support.html_pages import outline

HOSTILE_TEXTS = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)' x='",
    "</style><style>*{display:none}</style>",
    "</title></td></table></section><h1>",
    "<!-- --> ]]> <![CDATA[<svg onload=alert(1)>",
    "&lt;script&gt; &#60;b&#62; &amp;amp",
    "javascript:alert(1)",
    "a|b||c\\|d \\",
    "`x` ``` ~~~",
    "one\ntwo\r\nthree\u2028four\x85five",
    "# heading\n- item\n1. item\n> quote\n---\n",
    "[l](http://e) ![i](http://e) <http://e>",
    "**b** __i__ _j_ ~~s~~ $x^2$ $$y$$",
    "\x1b[2J\x1b[31m\x1b]8;;http://e\x1b\\link\x1b]8;;\x1b\\\x1b]0;title\x07\x9b1m",
    "over\rwritten\x08\x08\x7f",
    "\u202egnp.exe \u2066a\u2069 \u200f\u061c",
    "[red]x[/] [/] [bold [link=http://e]x[/link] :skull:",
    r"\input{/etc/passwd} \end{document} % $ # _ ^ ~ { } & ^^M \\[9cm]",
    "[b] *",
    "\0\ud800 \udfff",
    "²³٣ 9" + "9" * 30,
    "9" * 5000,
    "x" * 3000,
    "../../etc/passwd",
    "{0} {x} %s %(x)d ${HOME} $(id)",
    "_hidden",
    "中文 ﷺ 🏴\u200d☠️ e\u0301\u0301\u0301",
    "",
    " ",
)
_NUMBERS = (0, -1, 1, 2**63, 10**400, -(10**400), 1e308, -1e308, 5e-324, 0.1, float("nan"))
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [{}], [[[[1]]]])


def texts() -> st.SearchStrategy[str]:
    """Draw a hostile text, or any text."""
    anything = st.text(st.characters(exclude_categories=()), max_size=30)
    return st.one_of(st.sampled_from(HOSTILE_TEXTS), st.sampled_from(HOSTILE_TEXTS), anything)


def json_values() -> st.SearchStrategy[Any]:
    """Draw any JSON value."""
    other = st.one_of(st.sampled_from(_NUMBERS), st.sampled_from(_OTHERS), st.floats())
    return st.one_of(texts(), texts(), other, st.lists(texts(), max_size=3))


def positions(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of every value in a tree."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from positions(value)


@st.composite
def damaged_records(draw: st.DrawFn, *makers: Callable[[], dict[str, Any]], most: int = 12) -> Any:
    """Draw a record with up to ``most`` values changed, mostly texts that stay texts.

    The schema version stays, or the record would not be read. Most records with a missing key or a
    value of another type are refused, so only one record in four has one.
    """
    record = copy.deepcopy(draw(st.sampled_from(makers))())
    for _ in range(draw(st.integers(1, most))):
        found = [(c, key) for c, key in positions(record) if isinstance(c[key], str)]
        container, key = draw(st.sampled_from(found))
        container[key] = draw(texts())
    if draw(st.integers(0, 3)) == 0:
        container, key = draw(st.sampled_from([p for p in positions(record) if p[1] != "schema"]))
        way = draw(st.sampled_from(("value", "drop", "rename", "twice")))
        if way == "value":
            container[key] = copy.deepcopy(draw(json_values()))
        elif way == "drop":
            del container[key]
        elif way == "rename" and isinstance(container, dict):
            container[draw(texts())] = container.pop(key)
        elif way == "twice" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
    return record


_OURS = (
    "html head meta title style body header h1 h2 h3 h4 p b br nav a section div span figure "
    "figcaption table caption thead tbody tr th td ul li details summary small "
    "dl dt dd code "
    "svg g path defs use text tspan clippath rect image line style polyline"
)
TAGS = frozenset(_OURS.split())
ATTRIBUTES = re.compile(r"on\w+|formaction|srcdoc|action")


def check_page(page: str) -> None:
    """Check that a page is well-formed, has only our tags and runs or fetches nothing."""
    page.encode("utf-8")
    found = outline(page)
    assert found.tags <= TAGS, found.tags - TAGS
    assert all(
        ref.startswith(("#", "data:image/png;base64,"))
        or re.fullmatch(r"\./[\w.~%/-]*/report\.html", ref, re.ASCII)
        for ref in found.refers
    ), found.refers
    assert not [name for name in found.attributes if ATTRIBUTES.fullmatch(name)]
    check_plain("".join(found.text))
    check_plain(html.unescape(page))


def check_plain(text: str) -> None:
    """Check that text has no control characters (except line breaks and tabs) or bidi marks."""
    controls = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - set("\n\t")
    turning = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert not (controls | turning) & set(text)


def check_markdown(text: str) -> None:
    """Check that Markdown has only our tags, no code or pictures, and tables of constant width."""
    check_plain(text)
    ours = re.sub(r"<br>|</?details>|</?summary>|&(nbsp|lt|gt|amp);", "", text)
    assert "<" not in ours
    bare = re.sub(r"\\[\\`*|~$\[\]_]", "", text)
    assert "`" not in bare and "](" not in bare and "$" not in bare
    width = 0
    for line in bare.split("\n"):
        bars = line.count("|")
        if line.startswith("| "):
            assert width in (0, bars), line
            width = bars
        else:
            assert bars == 0, line
            width = 0
