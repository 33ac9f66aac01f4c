"""One OpenAI-compatible endpoint: ``POST <url>/chat/completions``, and nothing to anybody else.

Not huggingface_hub's InferenceClient: without a key it sends the user's Hugging Face token to
whatever server it is pointed at (version 2.4), it follows redirects, refuses a server on this very
machine under HF_HUB_OFFLINE, and puts /v1 behind paths that have another version. What is left to
do is one request; the standard library does it, through the proxies of the environment as ever.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.report.access import clean

_LARGEST = 8 * 1024**2  # bytes of a response
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server says
_HOPELESS = {401: "refuses the key", 403: "forbids the request", 404: "knows no such address"}
_AGAIN = (408, 409, 425, 429)  # and 500 to 599


class UnansweredError(Exception):
    """A request that brought no answer; the text says why.

    Args:
        reason: for the record.
        again: whether another try may help.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, *, again: bool, wait: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


@dataclass(frozen=True)
class Reply:
    """What the judge wrote.

    Attributes:
        text: empty where it wrote nothing.
        usage: tokens, as the server counts them.
        finish: why it stopped, as the server says.
    """

    text: str
    usage: dict[str, int]
    finish: str | None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What was meant for one server is not sent to another."""

    def redirect_request(self, *positional: Any, **named: Any) -> None:
        return None


class Endpoint:
    """A server that judges; may be used from several threads.

    Args:
        url: up to ``/chat/completions``, which may be left out, as may ``/v1`` on a bare host.
        key: sent as a bearer token; None sends none. It is never part of an error's text.
        timeout: seconds for one request, from beginning to end.
        retries: further tries after a network error, a 429 or a 5xx.
        backoff: seconds before the first further try, doubled for every next one.

    Attributes:
        shown: the address for records: no user, password or query.

    Raises:
        UsageError: no http or https address, a password in it, or a key that no header can hold.
    """

    def __init__(
        self, url: str, *, key: str | None, timeout: float, retries: int, backoff: float
    ) -> None:
        self._url, self.shown = _address(url)
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise UsageError("the key holds characters that no HTTP header can", where="--key-env")
        self._key, self._timeout, self._retries = key, timeout, retries
        self._backoff = backoff
        self._stopped = threading.Event()
        context = ssl.create_default_context()
        self._opener = urllib.request.build_opener(
            _NoRedirect, urllib.request.HTTPSHandler(context=context)
        )

    def stop(self) -> None:
        """End all waiting between tries: the process is about to leave."""
        self._stopped.set()

    def ask(self, body: dict[str, Any]) -> Reply:
        """One chat completion, tried again where that may help.

        Args:
            body: ``model``, ``messages`` and settings.

        Raises:
            UnansweredError: no answer after all tries.
            SparsegradError: no request can succeed: 401, 403, 404 or a redirect.
        """
        data = json.dumps(body).encode()
        for number in range(self._retries + 1):
            try:
                return self._once(data)
            except UnansweredError as error:
                if not error.again or number == self._retries or self._stopped.is_set():
                    raise
                wait = self._backoff * 2**number if error.wait is None else error.wait
                self._stopped.wait(min(wait, _LONGEST_WAIT))
        raise AssertionError("the last try returns or raises")

    def _once(self, data: bytes) -> Reply:
        headers = {"Content-Type": "application/json", "User-Agent": "sparsegrad"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data, headers)
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return _reply(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, deadline) from error
        except TimeoutError as error:
            raise UnansweredError(f"no answer within {self._timeout:g} s", again=True) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no answer within {self._timeout:g} s"
            said = clean(str(reason)) or type(reason).__name__
            raise UnansweredError(self.without_key(f"network: {said}"), again=True) from error

    def _refused(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """A status that is no success, as the error that fits."""
        code = error.code
        try:
            said = _message(_read(error, deadline))
        except (OSError, http.client.HTTPException):
            said = ""
        reason = self.without_key(f"HTTP {code}: {said or error.reason}")
        if code in _HOPELESS:
            return SparsegradError(
                f"the judge's endpoint {_HOPELESS[code]} ({reason})",
                where=self.shown,
                fix="check --endpoint and --model, and that --key-env names the right variable",
            )
        if 300 <= code < 400:
            return SparsegradError(
                f"the judge's endpoint answers with a redirect ({reason}); none is followed",
                where=self.shown,
                fix="give --endpoint the address that it redirects to, if you trust it",
            )
        again = code in _AGAIN or code >= 500
        return UnansweredError(reason, again=again, wait=_asked_to_wait(error.headers))

    def without_key(self, text: str) -> str:
        """A text in which a server may have quoted the key, without it."""
        return text.replace(self._key, "[key]") if self._key else text


def _address(url: str) -> tuple[str, str]:
    """(address to post to, address to show)."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise UsageError(
            f"{url!r} is no address",
            where="--endpoint",
            fix="for example https://api.openai.com/v1 or http://localhost:8000/v1",
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "an address with a password in it would end up in records",
            where="--endpoint",
            fix="put the key into an environment variable and name it with --key-env",
        )
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    plain = parts._replace(path=path, fragment="")
    return urlunsplit(plain), urlunsplit(plain._replace(query=""))


def _read(response: Any, deadline: float) -> bytes:
    """The body, if it comes within the time: a socket's timeout would start anew with every byte.

    Raises:
        TimeoutError, UnansweredError: too slow, too large.
    """
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _LARGEST:
            raise UnansweredError("the response is too large to be an answer", again=False)
    length = response.headers.get("Content-Length")
    if length is not None and length.isdigit() and size < int(length):
        raise http.client.IncompleteRead(b"".join(parts), int(length) - size)
    return b"".join(parts)


def _reply(content: bytes) -> Reply:
    try:
        found = json.loads(content)
        choice = found["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UnansweredError("the response is no chat completion", again=True) from error
    if isinstance(text, list):  # parts of a message
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    counts = {key: value for key, value in usage.items() if isinstance(value, int)}
    finish = choice.get("finish_reason")
    return Reply(text if isinstance(text, str) else "", counts, str(finish) if finish else None)


def _message(content: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(content)
        inner = found.get("error", found.get("message", "")) if isinstance(found, dict) else found
        said = inner.get("message", "") if isinstance(inner, dict) else inner
    except (ValueError, RecursionError):
        said = content.decode("utf-8", "replace")
    return clean(str(said)[:1000])[:300]


def _asked_to_wait(headers: Any) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    asked = headers.get("Retry-After") or ""
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
