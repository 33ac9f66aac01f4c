"""An HTTP server that plays the judge, and files of questions and answers for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.questions import Question, read_questions


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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            request = {
                "path": self.path,
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "body": json.loads(content),
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
            self.send_response(response.status)
            for name, value in response.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            # Announce the close: a client that reuses the connection would lose one attempt.
            self.send_header("Connection", "close")
            self.end_headers()
            if response.drip:
                for byte in content:
                    time.sleep(response.drip)
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                return
            self.wfile.write(content[: len(content) // 2] if response.cut else content)

        def log_message(self, *arguments: Any) -> None:
            return

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


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
