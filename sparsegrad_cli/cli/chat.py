"""Hold a conversation in the terminal or over a pipe."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, TextIO

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.io.untrusted_text import printable_text

if TYPE_CHECKING:
    from sparsegrad_cli.tasks.answerer import Answerer

_HELP = "/reset starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
_COMMAND = re.compile(r"/[a-z]+")


class Chat:
    """Read one turn per line, stream the answer, and remember both.

    Args:
        answerer: The model.
        source: The user's lines.
        out: Receives the answers.
        err: Receives everything else.
    """

    def __init__(self, answerer: Answerer, *, source: TextIO, out: TextIO, err: TextIO) -> None:
        self._answerer, self._source, self._out, self._err = answerer, source, out, err
        self._interactive = source.isatty() and out.isatty()
        self._turns: list[Turn] = []
        self._count = 0

    def run(self, about: dict[str, Any]) -> None:
        """Converse until the lines end or the user types /exit."""
        if self._interactive:
            self._say(f"{about['model']}: {_HELP}")
        with contextlib.suppress(EOFError):
            while True:
                line = self._read_line().strip()
                if line in ("/exit", "/quit"):
                    return
                if line == "/reset":
                    self._turns.clear()
                    self._say("a new conversation")
                elif _COMMAND.fullmatch(line):
                    self._say(_HELP)
                elif line:
                    self._answer(line)

    def _read_line(self) -> str:
        """Return the next line; Ctrl-C discards a line that is being typed.

        Raises:
            EOFError: There are no more lines.
        """
        while self._interactive:
            try:
                return input("> ")
            except KeyboardInterrupt:
                self._say("\n" + _HELP)
        line = self._source.readline()
        if not line:
            raise EOFError
        return line

    def _answer(self, line: str) -> None:
        """Stream an answer; the part shown before Ctrl-C stays in the conversation."""
        told: list[str] = []

        def tell(text: str) -> None:
            told.append(text)
            self._out.write(printable_text(text))
            self._out.flush()

        turns = [*self._turns, Turn("user", line)]
        self._count += 1
        problem = None
        try:
            answer = self._answerer.stream(turns, tell, str(self._count))
            if answer.stopped == "full" and not answer.tokens:
                problem = (
                    "the conversation fills all positions of the model: /reset starts a new one"
                )
        except KeyboardInterrupt:
            problem = "stopped"
        except DataError as error:
            problem = error.what
        if told:
            self._turns = [*turns, Turn("assistant", "".join(told).strip())]
            if not told[-1].endswith("\n"):
                self._out.write("\n")
            self._out.flush()
        if problem is not None:
            self._say(problem)

    def _say(self, text: str) -> None:
        print(printable_text(text), file=self._err, flush=True)
