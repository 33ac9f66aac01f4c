"""An HTTP server that plays the judge, and files of questions and answers for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.questions import Question, read_questions
from support.local_server import Handler, served


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        text: the text that the judge writes; None sends ``body`` instead.
        body: any bytes.
        delay: seconds before anything is sent.
        drip: seconds between two bytes of the body.
        cut: send half of the body, then close.
    """

    text: str | None = None
    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    drip: float = 0.0
    cut: bool = False

    def content(self) -> bytes:
        if self.text is None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return json.dumps({"choices": [choice], "usage": {"total_tokens": 7}}).encode()


# (body of a request, number of earlier requests) -> response
Responder = Callable[[dict[str, Any], int], Response]


@dataclass
class Server:
    """The URL of the server and the requests that it received."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """Return the users' messages in order of arrival."""
        return [r["body"]["messages"][-1]["content"] for r in self.requests]


@contextmanager
def judge_server(responder: Responder) -> Iterator[Server]:
    """Serve on a free port of this machine inside the context."""
    server = Server("")
    lock = threading.Lock()

    class JudgeHandler(Handler):
        def do_POST(self) -> None:
            request = {
                "path": self.path,
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "body": json.loads(self.read_body()),
            }
            with lock:
                number = len(server.requests)
                server.requests.append(request)
            response = responder(request["body"], number)
            time.sleep(response.delay)
            try:
                self._send(response)
            except OSError:
                return  # the client gave up, as expected

        def _send(self, response: Response) -> None:
            content = response.content()
            self.send_head(response.status, len(content), response.headers)
            if response.drip:
                for byte in content:
                    time.sleep(response.drip)
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                return
            self.wfile.write(content[: len(content) // 2] if response.cut else content)

    with served(JudgeHandler) as url:
        server.url = f"{url}/v1"
        yield server


def always_answer(text: str) -> Responder:
    """Return a responder that always gives the same answer."""
    return lambda body, number: Response(text)


def questions_file(folder: Path) -> Path:
    """Write three questions in two categories; one has two turns, another has a reference."""
    rows = [
        {"question_id": 1, "category": "math", "turns": ["2 + 2?", "Twice that?"]},
        {"question_id": 2, "category": "math", "turns": ["3 * 3?"], "reference": ["Nine."]},
        {"question_id": "w", "category": "writing", "turns": ["Write a line."]},
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers_file(
    path: Path, questions: Path, answer: Callable[[Question, int], str], **more: Any
) -> Path:
    """Write answers as ``sparsegrad generate`` does, for a model named after the file."""
    lines = []
    for question in read_questions(str(questions)):
        answers = [answer(question, turn) for turn in range(len(question.turns))]
        lines.append(
            {
                "format": "sparsegrad-answers-1",
                "question_id": question.id,
                "category": question.category,
                "turns": list(question.turns),
                "answers": answers,
                "model": path.stem,
                **more,
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_verdicts(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of verdicts.jsonl."""
    text = (folder / "verdicts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def find_row(record: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """Return the only row with these values."""
    rows: Sequence[dict[str, Any]] = record["rows"]
    (found,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return found
