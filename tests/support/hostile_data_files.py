"""Strategies for hostile data files: CSV, TSV, JSON lines and JSON arrays of every data kind."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from support.hostile_text import HOSTILE_TEXTS, json_values, texts

_LABELS = ("0", "1", "yes", "no", "0.5", "1e999", "-1e999", "nan", "Infinity", "9" * 400, "1e300")
_NAMES = ("text", "label", "text_pair", "prompt", "completion", "messages", "system", "input")
_RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000, "[" * 3000, "{}", "nul", "")
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_ENDS = ("\n", "\r\n", "\r", "\n\n")


def _cells() -> st.SearchStrategy[str]:
    return st.one_of(texts(), st.sampled_from(_LABELS), st.sampled_from(('"', '""', '"a\n', "\0")))


@st.composite
def delimited(draw: st.DrawFn) -> bytes:
    """Draw a table with commas or tabs, with or without quotes, with rows of any length."""
    mark = draw(st.sampled_from(",\t"))
    header = draw(st.sampled_from((["text", "label"], ["text", "text_pair", "label"], [*_NAMES])))
    if not draw(st.integers(0, 9)):
        header = draw(st.lists(_cells(), max_size=4))
    wide = len(header)
    row = st.lists(_cells(), min_size=wide, max_size=wide)
    rows = draw(st.lists(st.one_of(row, row, st.lists(_cells(), max_size=4)), max_size=3))
    good = [[f"t{n}", *["u"] * (len(header) - 2), str(n % 2)] for n in range(4)]
    quoted = draw(st.booleans())

    def line(cells: list[str]) -> str:
        shown = [f'"{c.replace(chr(34), chr(34) * 2)}"' if quoted else c for c in cells]
        return mark.join(shown)

    text = draw(st.sampled_from(_ENDS)).join(map(line, [header, *good, *rows]))
    return _with_damaged_bytes(
        draw, text.encode("utf-8", draw(st.sampled_from(("replace", "surrogatepass"))))
    )


def _with_damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Change, cut or insert a few bytes in some of the cases."""
    if draw(st.integers(0, 3)) or not content:
        return content
    at = draw(st.integers(0, len(content) - 1))
    put = draw(st.sampled_from((b"\xff", b"\0", b'"', b"\xef\xbb\xbf", b"\x1f\x8b", b"\xc3", b"")))
    return content[:at] + put + content[at + draw(st.integers(0, 3)) :]


def _turns() -> st.SearchStrategy[Any]:
    roles = st.one_of(
        st.sampled_from(("user", "assistant", "system", "human", "gpt")), json_values()
    )
    message = st.fixed_dictionaries({"role": roles, "content": json_values()})
    return st.one_of(st.just(CHAT), st.lists(message, max_size=3), json_values())


def _row() -> st.SearchStrategy[dict[str, Any]]:
    tabular = st.fixed_dictionaries(
        {"text": json_values(), "label": st.one_of(st.sampled_from(_LABELS), json_values())}
    )
    talk = st.fixed_dictionaries({"messages": _turns()})
    prompt = st.fixed_dictionaries({"prompt": _turns(), "completion": _turns()})
    anything = st.dictionaries(
        st.one_of(st.sampled_from(_NAMES), texts()), json_values(), max_size=4
    )
    return st.one_of(tabular, talk, prompt, anything)


_GOOD: dict[str, list[dict[str, Any]]] = {
    "classes": [{"text": f"t{n}", "label": n % 2} for n in range(4)],
    "scores": [{"text": f"t{n}", "label": n / 4} for n in range(4)],
    "chats": [{"messages": [turn | {"content": f"{n}"} for turn in CHAT]} for n in range(12)],
    "completions": [{"prompt": f"p{n}", "completion": "c"} for n in range(12)],
    "questions": [{"question_id": n, "turns": ["Why?"], "answers": ["So."]} for n in range(3)],
}


@st.composite
def json_rows(
    draw: st.DrawFn, *kinds: str, rows: st.SearchStrategy[Any] | None = None, most: int = 3
) -> bytes:
    """Draw JSON lines or one JSON array with valid rows and other rows."""
    found = list(_GOOD[draw(st.sampled_from(kinds))])
    for row in draw(st.lists(_row() if rows is None else rows, max_size=most)):
        found.insert(draw(st.integers(0, len(found))), row)
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in found]
    lines += draw(st.lists(st.sampled_from(_RAW), max_size=1))
    whole = draw(st.booleans())
    text = f"[{', '.join(lines)}]" if whole else "\n".join(lines)
    return _with_damaged_bytes(draw, text.encode("utf-8", "surrogatepass"))


def questions() -> st.SearchStrategy[dict[str, Any]]:
    """Draw a line of a questions or an answers file."""
    turns = st.one_of(
        st.lists(st.sampled_from(("Why?", *HOSTILE_TEXTS)), max_size=2), json_values()
    )
    return st.fixed_dictionaries(
        {"question_id": st.one_of(st.integers(0, 2), json_values()), "turns": turns},
        optional={
            "category": json_values(),
            "reference": json_values(),
            "answers": turns,
            "prompt": json_values(),
            "model": json_values(),
            "digest": json_values(),
            "settings": json_values(),
        },
    )
