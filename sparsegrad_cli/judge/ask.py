"""Asking the judge, several prompts at a time, and reading what it replies."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.judge.endpoint import Endpoint, UnansweredError
from sparsegrad_cli.judge.tasks import Task
from sparsegrad_cli.judge.verdicts import parse_rating, parse_winner
from sparsegrad_cli.records.base import now

# How a prompt ended: with a verdict, with replies that hold none, or without a reply.
DECIDED, UNREADABLE, FAILED = "decided", "unreadable", "failed"


@dataclass(frozen=True)
class Judge:
    """Who is asked, and how.

    Attributes:
        endpoint: the server.
        model: its name there.
        max_tokens: of a reply; None leaves it to the server.
        retries: further requests after a reply without a verdict.
    """

    endpoint: Endpoint
    model: str
    max_tokens: int | None
    retries: int

    def verdict(self, task: Task) -> dict[str, Any]:
        """Ask until there is a verdict, and say in a record how it went.

        Raises:
            SparsegradError: no request to this endpoint can succeed.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": task.messages,
            "temperature": 0,
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        read = parse_winner if task.pairwise else parse_rating
        replies: list[dict[str, Any]] = []
        verdict, status, reason = None, UNREADABLE, None
        started = time.perf_counter()
        for _ in range(self.retries + 1):
            try:
                reply = self.endpoint.ask(body)
            except UnansweredError as error:
                status, reason = FAILED, str(error)
                break
            text = self.endpoint.without_key(reply.text)
            replies.append({"text": text, "finish": reply.finish, "usage": reply.usage})
            verdict = read(text)
            if verdict is not None:
                status = DECIDED
                break
        return {
            **task.record(),
            "judge": self.model,
            "endpoint": self.endpoint.shown,
            "replies": replies,
            "status": status,
            "verdict": verdict,
            "reason": reason,
            "seconds": round(time.perf_counter() - started, 3),
            "time": now(),
        }


def ask_all(judge: Judge, tasks: Sequence[Task], jobs: int) -> Iterator[dict[str, Any]]:
    """Records of verdicts as they come in, not in order.

    The threads are daemons: on Ctrl-C the process leaves without waiting for a slow server.

    Raises:
        SparsegradError: as :meth:`Judge.verdict`; nothing more is asked.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
    stopped = threading.Event()
    for task in tasks:
        waiting.put(task)

    def work() -> None:
        while not stopped.is_set():
            try:
                done.put(judge.verdict(waiting.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:
                done.put(error)
                return

    try:
        for _ in range(min(jobs, len(tasks))):
            threading.Thread(target=work, daemon=True).start()
        for _ in tasks:
            found = done.get()
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        stopped.set()
        judge.endpoint.stop()
