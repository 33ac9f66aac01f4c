"""A real HTTP server that speaks the protocol of a judge, well or badly; and answers to judge."""

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

from sparsegrad_cli.generate.questions import Question, read_questions


@dataclass(frozen=True)
class Said:
    """One response.

    Attributes:
        text: what the judge writes; None sends ``body`` instead.
        body: bytes that need be no chat completion.
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


# From the body of a request and how many came before it (of all) to a response.
Judges = Callable[[dict[str, Any], int], Said]


@dataclass
class Server:
    """Where it listens, and what it was asked."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """The users' messages, in the order they came."""
        return [r["body"]["messages"][-1]["content"] for r in self.requests]


@contextmanager
def judge_server(judges: Judges) -> Iterator[Server]:
    """Listens on a free port of this machine while open."""
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
            said = judges(request["body"], number)
            time.sleep(said.delay)
            try:
                self._send(said)
            except OSError:
                return  # the client has given up, as it should

        def _send(self, said: Said) -> None:
            content = said.content()
            self.send_response(said.status)
            for name, value in said.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            # Said, not only done: a client that reuses the connection loses a try to it.
            self.send_header("Connection", "close")
            self.end_headers()
            if said.drip:
                for byte in content:
                    time.sleep(said.drip)
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                return
            self.wfile.write(content[: len(content) // 2] if said.cut else content)

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


def always(text: str) -> Judges:
    """A judge that says the same whatever it is asked."""
    return lambda body, number: Said(text)


def questions_file(folder: Path) -> Path:
    """Two questions of one category, one of them with two turns and a reference; one of another."""
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
    """Lines as ``sparsegrad generate`` writes them, of a model named after the file."""
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


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """The lines of verdicts.jsonl."""
    text = (folder / "verdicts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def row(record: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The one row with these values."""
    rows: Sequence[dict[str, Any]] = record["rows"]
    (found,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return found
