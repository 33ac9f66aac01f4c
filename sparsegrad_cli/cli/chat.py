"""A conversation in the terminal, or with whatever is at the other end of a pipe."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, TextIO

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.io.untrusted_text import printable_text

if TYPE_CHECKING:
    from sparsegrad_cli.generate.answerer import Answerer

_HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
_COMMAND = re.compile(r"/[a-z]+")


class Chat:
    """Reads a turn a line, streams the answer, remembers both.

    Args:
        answerer: who answers.
        source: where lines come from.
        out: where answers go.
        err: where everything else goes.
    """

    def __init__(self, answerer: Answerer, *, source: TextIO, out: TextIO, err: TextIO) -> None:
        self._answerer, self._source, self._out, self._err = answerer, source, out, err
        self._typed = source.isatty() and out.isatty()
        self._turns: list[Turn] = []
        self._count = 0

    def run(self, about: dict[str, Any]) -> None:
        """Until the lines end, or /exit."""
        if self._typed:
            self._say(f"{about['model']}: {_HELP}")
        with contextlib.suppress(EOFError):
            while True:
                line = self._line().strip()
                if line in ("/exit", "/quit"):
                    return
                if line == "/reset":
                    self._turns.clear()
                    self._say("a new conversation")
                elif _COMMAND.fullmatch(line):
                    self._say(_HELP)
                elif line:
                    self._answer(line)

    def _line(self) -> str:
        """The next line; Ctrl-C drops what has been typed of it.

        Raises:
            EOFError: there are no more.
        """
        while self._typed:
            try:
                return input("> ")
            except KeyboardInterrupt:
                self._say("\n" + _HELP)
        line = self._source.readline()
        if not line:
            raise EOFError
        return line

    def _answer(self, line: str) -> None:
        """Stream an answer; what is told of it before Ctrl-C stays part of the conversation."""
        told: list[str] = []

        def tell(text: str) -> None:
            told.append(text)
            self._out.write(printable_text(text))
            self._out.flush()

        asked = [*self._turns, Turn("user", line)]
        self._count += 1
        stopped = None
        try:
            answer = self._answerer.stream(asked, tell, str(self._count))
            if answer.stopped == "full" and not answer.tokens:
                stopped = "the conversation fills the model's positions: /reset begins anew"
        except KeyboardInterrupt:
            stopped = "stopped"
        except DataError as error:
            stopped = error.what
        if told:
            self._turns = [*asked, Turn("assistant", "".join(told).strip())]
            if not told[-1].endswith("\n"):
                self._out.write("\n")
            self._out.flush()
        if stopped is not None:
            self._say(stopped)

    def _say(self, text: str) -> None:
        print(printable_text(text), file=self._err, flush=True)
