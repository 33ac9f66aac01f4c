"""Data files to be afraid of: CSV, TSV, JSON lines, arrays; chats, questions, answers, verdicts."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from support.hostile_text import EVIL, values, words

_LABELS = ("0", "1", "yes", "no", "0.5", "1e999", "-1e999", "nan", "Infinity", "9" * 400, "1e300")
_NAMES = ("text", "label", "text_pair", "prompt", "completion", "messages", "system", "input")
_RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000, "[" * 3000, "{}", "nul", "")
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_ENDS = ("\n", "\r\n", "\r", "\n\n")


def _cells() -> st.SearchStrategy[str]:
    return st.one_of(words(), st.sampled_from(_LABELS), st.sampled_from(('"', '""', '"a\n', "\0")))


@st.composite
def delimited(draw: st.DrawFn) -> bytes:
    """A table with commas or tabs, quoted or not, rows of any length, bytes of any kind."""
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
    return _spoilt(draw, text.encode("utf-8", draw(st.sampled_from(("replace", "surrogatepass")))))


def _spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Mostly as it is; else with a few bytes changed, cut or put in."""
    if draw(st.integers(0, 3)) or not content:
        return content
    at = draw(st.integers(0, len(content) - 1))
    put = draw(st.sampled_from((b"\xff", b"\0", b'"', b"\xef\xbb\xbf", b"\x1f\x8b", b"\xc3", b"")))
    return content[:at] + put + content[at + draw(st.integers(0, 3)) :]


def _turns() -> st.SearchStrategy[Any]:
    roles = st.one_of(st.sampled_from(("user", "assistant", "system", "human", "gpt")), values())
    message = st.fixed_dictionaries({"role": roles, "content": values()})
    return st.one_of(st.just(TALK), st.lists(message, max_size=3), values())


def _row() -> st.SearchStrategy[dict[str, Any]]:
    tabular = st.fixed_dictionaries(
        {"text": values(), "label": st.one_of(st.sampled_from(_LABELS), values())}
    )
    talk = st.fixed_dictionaries({"messages": _turns()})
    prompt = st.fixed_dictionaries({"prompt": _turns(), "completion": _turns()})
    anything = st.dictionaries(st.one_of(st.sampled_from(_NAMES), words()), values(), max_size=4)
    return st.one_of(tabular, talk, prompt, anything)


_GOOD: dict[str, list[dict[str, Any]]] = {
    "classes": [{"text": f"t{n}", "label": n % 2} for n in range(4)],
    "scores": [{"text": f"t{n}", "label": n / 4} for n in range(4)],
    "chats": [{"messages": [turn | {"content": f"{n}"} for turn in TALK]} for n in range(12)],
    "completions": [{"prompt": f"p{n}", "completion": "c"} for n in range(12)],
    "questions": [{"question_id": n, "turns": ["Why?"], "answers": ["So."]} for n in range(3)],
}


@st.composite
def json_rows(
    draw: st.DrawFn, *kinds: str, rows: st.SearchStrategy[Any] | None = None, most: int = 3
) -> bytes:
    """JSON lines or one array: rows of a kind that is right, and others; bytes of any kind."""
    found = list(_GOOD[draw(st.sampled_from(kinds))])
    for row in draw(st.lists(_row() if rows is None else rows, max_size=most)):
        found.insert(draw(st.integers(0, len(found))), row)
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in found]
    lines += draw(st.lists(st.sampled_from(_RAW), max_size=1))
    whole = draw(st.booleans())
    text = f"[{', '.join(lines)}]" if whole else "\n".join(lines)
    return _spoilt(draw, text.encode("utf-8", "surrogatepass"))


def questions() -> st.SearchStrategy[dict[str, Any]]:
    """A line of a file of questions, or of answers to them."""
    turns = st.one_of(st.lists(st.sampled_from(("Why?", *EVIL)), max_size=2), values())
    return st.fixed_dictionaries(
        {"question_id": st.one_of(st.integers(0, 2), values()), "turns": turns},
        optional={
            "category": values(),
            "reference": values(),
            "answers": turns,
            "prompt": values(),
            "model": values(),
            "digest": values(),
            "settings": values(),
        },
    )
