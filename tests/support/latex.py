"""Check LaTeX source: groups, environments and table rows close, and text is escaped."""

from __future__ import annotations

import re


def tokens(source: str) -> list[str]:
    """Return commands, escaped characters and single characters, without comments."""
    plain = re.sub(r"(?<!\\)%[^\n]*\n?", "", source)
    return re.findall(r"\\[a-zA-Z]+|\\.|.", plain, re.DOTALL)


def check_latex(source: str) -> None:
    """Check that braces, environments and mathematics close in order and rows are complete."""
    depth, math, opened, columns, cells = 0, False, [], 0, 1
    found = tokens(source)
    for at, token in enumerate(found):
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            assert depth >= 0
        elif token == "$":
            math = not math
        elif token == r"\begin":
            opened.append("".join(found[at + 2 : found.index("}", at)]))
        elif token == r"\end":
            assert opened.pop() == "".join(found[at + 2 : found.index("}", at)])
            assert depth == 0 and not math
        if token == r"\begin" and opened[-1] == "tabular":
            kinds = found.index("{", found.index("}", at)) + 1
            columns, cells = found.index("}", kinds) - kinds, 1
        assert token not in ("#", "~~", "^", "_"), "a character that TeX reads as a command"
        if opened[-1:] == ["tabular"] and depth == 0:
            if token == "&":
                cells += 1
            elif token == "\\\\":
                assert cells == columns
                assert found[at + 1] not in ("[", "*")
                cells = 1
        elif token == "&":
            raise AssertionError("a column outside a table")
    assert not opened and depth == 0 and not math
