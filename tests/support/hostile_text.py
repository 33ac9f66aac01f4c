"""Text and records to be afraid of: what obeys, what breaks out, what no number is."""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from support.html_pages import outline

EVIL = (
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


def words() -> st.SearchStrategy[str]:
    """A text that means harm, or any text at all."""
    anything = st.text(st.characters(exclude_categories=()), max_size=30)
    return st.one_of(st.sampled_from(EVIL), st.sampled_from(EVIL), anything)


def values() -> st.SearchStrategy[Any]:
    """Whatever JSON can hold in one place."""
    other = st.one_of(st.sampled_from(_NUMBERS), st.sampled_from(_OTHERS), st.floats())
    return st.one_of(words(), words(), other, st.lists(words(), max_size=3))


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or number) of everything in a tree."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def records(draw: st.DrawFn, *makers: Callable[[], dict[str, Any]], most: int = 12) -> Any:
    """A record with up to so many places changed: most of them texts, which stay texts.

    The schema is left, or the record would not be read. A value of another type, or a key that is
    missing, makes most records refused: one record in four has such a place.
    """
    record = copy.deepcopy(draw(st.sampled_from(makers))())
    for _ in range(draw(st.integers(1, most))):
        found = [(c, key) for c, key in places(record) if isinstance(c[key], str)]
        container, key = draw(st.sampled_from(found))
        container[key] = draw(words())
    if draw(st.integers(0, 3)) == 0:
        container, key = draw(st.sampled_from([p for p in places(record) if p[1] != "schema"]))
        way = draw(st.sampled_from(("value", "drop", "rename", "twice")))
        if way == "value":
            container[key] = copy.deepcopy(draw(values()))
        elif way == "drop":
            del container[key]
        elif way == "rename" and isinstance(container, dict):
            container[draw(words())] = container.pop(key)
        elif way == "twice" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
    return record


_OURS = (
    "html head meta title style body header h1 h2 h3 h4 p b br nav a section div span figure "
    "figcaption table caption thead tbody tr th td ul li details summary small "
    "svg g path defs use text tspan clippath rect image line style polyline"
)
TAGS = frozenset(_OURS.split())
ATTRIBUTES = re.compile(r"on\w+|formaction|srcdoc|action")


def check_page(page: str) -> None:
    """Well-formed, with none but our own tags, nothing run and nothing fetched."""
    page.encode("utf-8")
    found = outline(page)
    assert found.tags <= TAGS, found.tags - TAGS
    assert all(ref.startswith(("#", "data:image/png;base64,")) for ref in found.refers)
    assert not [name for name in found.attributes if ATTRIBUTES.fullmatch(name)]
    check_plain("".join(found.text))
    check_plain(html.unescape(page))


def check_plain(text: str) -> None:
    """No control characters but line breaks and tabs, and nothing that turns the direction."""
    controls = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - set("\n\t")
    turning = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert not (controls | turning) & set(text)


def check_markdown(text: str) -> None:
    """No tag but ours, no code, no picture, and the rows of a table of one width."""
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
