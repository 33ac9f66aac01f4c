"""Ask the judge, a language model behind an OpenAI-compatible endpoint.

The ``openai`` client retries, waits as long as the server asks, and uses the proxies of the
environment. In addition, this module follows no redirects, sends only the key of ``--key-env``, and
stops the command after a failure that would affect every request.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.judge.prompts import parse_rating, parse_winner
from sparsegrad_cli.judge.tasks import Task
from sparsegrad_cli.records.answers import JudgeReply, JudgeVerdict
from sparsegrad_cli.records.base import now

_COMPLETIONS = "/chat/completions"
_PERMANENT = {401: "refuses the key", 403: "forbids the request", 404: "has no such address"}


class UnansweredError(Exception):
    """A request failed, but others may succeed; the text says why, for the record."""


class Endpoint:
    """A server with the judging model; may be used from several threads.

    Args:
        url: The address, with or without ``/chat/completions``; ``/v1`` is added to a bare host.
        key: The bearer token, or None. It is never part of an error message.
        timeout: Seconds to wait for data from the server.
        retries: Number of retries after a network error, a 408, 409, 429 or a 5xx.

    Attributes:
        shown: The address for records, without user, password and query.

    Raises:
        UsageError: The ``openai`` package is not installed, the address is not http or https or
            contains a password, or the key has characters that a header cannot have.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, retries: int) -> None:
        base, query, self.shown = _address(url)
        if key is not None and (not key.isascii() or not key.isprintable()):
            what = "the key has characters that an HTTP header cannot have"
            raise UsageError(what, where="--key-env")
        try:
            import openai
        except ImportError:
            raise UsageError(
                "`sparsegrad judge` needs the openai package, which is not installed",
                fix="pip install 'sparsegrad[judge]'",
            ) from None
        self._key = key
        # The client reads these from the environment, for any server.
        unsent = ["OpenAI-Organization", "OpenAI-Project", *(["Authorization"] if not key else [])]
        self._headers: Any = dict.fromkeys(unsent, openai.omit)
        self._client = openai.OpenAI(
            base_url=base,
            api_key=key or "none",  # The client requires a key even if it is not sent.
            default_query=query,
            timeout=timeout,
            max_retries=retries,
            # Do not send data for one server to another.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def stop(self) -> None:
        """Close the connections, before the process exits."""
        self._client.close()

    def ask(self, body: dict[str, Any]) -> JudgeReply:
        """Ask for one chat completion; the client retries if that may help.

        Args:
            body: ``model``, ``messages`` and settings.

        Raises:
            UnansweredError: There is no answer after all tries.
            SparsegradError: No request can succeed: 401, 403, 404 or a redirect.
        """
        import openai

        try:
            answer = self._client.chat.completions.create(**body, extra_headers=self._headers)
        except openai.APITimeoutError as error:
            raise UnansweredError(f"no answer within {self._client.timeout:g} s") from error
        except openai.APIStatusError as error:
            raise self._refused(error) from error
        except openai.APIConnectionError as error:
            said = printable_line(str(error.__cause__ or error)) or type(error.__cause__).__name__
            raise UnansweredError(self.without_key(f"network: {said}")) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise UnansweredError("the response is not a chat completion") from error
        return _reply(answer)

    def _refused(self, error: Any) -> Exception:
        """Return the error for an HTTP status."""
        code = error.status_code
        reason = self.without_key(f"HTTP {code}: {_message(error.body) or error.message}")
        if code in _PERMANENT:
            return SparsegradError(
                f"the judge's endpoint {_PERMANENT[code]} ({reason})",
                where=self.shown,
                fix="check --endpoint and --model, and that --key-env names the right variable",
            )
        if 300 <= code < 400:
            return SparsegradError(
                f"the judge's endpoint answers with a redirect ({reason}), which is not followed",
                where=self.shown,
                fix="give --endpoint the address that it redirects to, if you trust it",
            )
        return UnansweredError(reason)

    def without_key(self, text: str) -> str:
        """Remove the key from a text in which a server may have quoted it."""
        return text.replace(self._key, "[key]") if self._key else text


@dataclass(frozen=True)
class Judge:
    """The judging model.

    Attributes:
        endpoint: The server.
        model: The model's name there.
        max_tokens: Largest number of tokens of a reply; None uses the server's limit.
        retries: Further requests after a reply without a verdict.
    """

    endpoint: Endpoint
    model: str
    max_tokens: int | None
    retries: int

    def verdict(self, task: Task) -> JudgeVerdict:
        """Ask until there is a verdict.

        Raises:
            SparsegradError: No request to this endpoint can succeed.
        """
        body: dict[str, Any] = {"model": self.model, "messages": task.messages, "temperature": 0}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        parse = parse_winner if task.pairwise else parse_rating
        replies: list[JudgeReply] = []
        verdict, status, reason = None, "unreadable", None
        started = time.perf_counter()
        for _ in range(self.retries + 1):
            try:
                reply = self.endpoint.ask(body)
            except UnansweredError as error:
                status, reason = "failed", str(error)
                break
            replies.append(reply.changed(text=self.endpoint.without_key(reply.text)))
            verdict = parse(replies[-1].text)
            if verdict is not None:
                status = "decided"
                break
        return JudgeVerdict.model_validate(
            {
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
        )

    def verdicts(self, tasks: Sequence[Task], jobs: int) -> Iterator[JudgeVerdict]:
        """Yield the verdicts as they come in, with up to ``jobs`` requests at a time.

        The threads are daemons, so that after Ctrl-C the process does not wait for the server.

        Raises:
            SparsegradError: See :meth:`verdict`; no more requests are sent.
        """
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        done: queue.SimpleQueue[JudgeVerdict | Exception] = queue.SimpleQueue()
        stopped = threading.Event()
        for task in tasks:
            waiting.put(task)

        def work() -> None:
            while not stopped.is_set():
                try:
                    done.put(self.verdict(waiting.get_nowait()))
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
            self.endpoint.stop()


def _address(url: str) -> tuple[str, dict[str, object], str]:
    """Return (base address of the API, query, address for records)."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise UsageError(
            f"{url!r} is not an http or https address",
            where="--endpoint",
            fix="for example https://api.openai.com/v1 or http://localhost:8000/v1",
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "the address contains a password, which would be written to the records",
            where="--endpoint",
            fix="put the key into an environment variable and name it with --key-env",
        )
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) or "/v1"
    base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return base, dict(parse_qsl(parts.query)), base + _COMPLETIONS


def _reply(answer: Any) -> JudgeReply:
    """Return the first choice of a completion, which the client has not checked."""
    try:
        found = answer.model_dump(warnings=False)
        choice = found["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UnansweredError("the response is not a chat completion") from error
    if isinstance(text, list):  # A message in parts.
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    counts = {key: value for key, value in usage.items() if isinstance(value, int)}
    finish = choice.get("finish_reason")
    return JudgeReply(
        text=text if isinstance(text, str) else "",
        finish=str(finish) if finish else None,
        usage=counts,
    )


def _message(body: Any) -> str:
    """Return the message in the body of an error, on one line."""
    inner = body.get("error", body.get("message", "")) if isinstance(body, dict) else body
    said = inner.get("message", "") if isinstance(inner, dict) else inner
    return printable_line(str(said or "")[:1000])[:300]
