"""One OpenAI-compatible endpoint, asked through the ``openai`` client.

The client brings retries, waiting as the server asks and the proxies of the environment. Here is
what a judge needs beside it: no redirect is followed, only ``--key-env`` is sent as a key, and
every failure is told apart by whether another request could succeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.io.untrusted_text import printable_line

_COMPLETIONS = "/chat/completions"
_HOPELESS = {401: "refuses the key", 403: "forbids the request", 404: "knows no such address"}


class UnansweredError(Exception):
    """A request failed, and others may still succeed; the text says why, for the record."""


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


class Endpoint:
    """A server that judges; may be used from several threads.

    Args:
        url: up to ``/chat/completions``, which may be left out, as may ``/v1`` on a bare host.
        key: sent as a bearer token; None sends none. It is never part of an error's text.
        timeout: seconds that the server may stay silent.
        retries: further tries after a network error, a 408, 409, 429 or a 5xx.

    Attributes:
        shown: the address for records: no user, password or query.

    Raises:
        UsageError: the ``openai`` package is not installed, the address is not http or https or
            holds a password, or no header can hold the key.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, retries: int) -> None:
        base, query, self.shown = _address(url)
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise UsageError("the key holds characters that no HTTP header can", where="--key-env")
        try:
            import openai
        except ImportError:
            raise UsageError(
                "`sparsegrad judge` needs the openai package, which is not installed",
                fix="pip install 'sparsegrad[judge]'",
            ) from None
        self._key = key
        # The client adds these from the environment, whichever server it asks.
        unsent = ["OpenAI-Organization", "OpenAI-Project", *(["Authorization"] if not key else [])]
        self._headers: Any = dict.fromkeys(unsent, openai.omit)
        self._client = openai.OpenAI(
            base_url=base,
            api_key=key or "none",  # must not be empty, also where it is not sent
            default_query=query,
            timeout=timeout,
            max_retries=retries,
            # What was meant for one server is not sent to another.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def stop(self) -> None:
        """Close the connections: the process is about to leave."""
        self._client.close()

    def ask(self, body: dict[str, Any]) -> Reply:
        """Ask for one chat completion; the client repeats the request where that may help.

        Args:
            body: ``model``, ``messages`` and settings.

        Raises:
            UnansweredError: no answer after all tries.
            SparsegradError: no request can succeed: 401, 403, 404 or a redirect.
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
        """A status that is no success, as the error that fits."""
        code = error.status_code
        reason = self.without_key(f"HTTP {code}: {_message(error.body) or error.message}")
        if code in _HOPELESS:
            return SparsegradError(
                f"the judge's endpoint {_HOPELESS[code]} ({reason})",
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
        """A text in which a server may have quoted the key, without it."""
        return text.replace(self._key, "[key]") if self._key else text


def _address(url: str) -> tuple[str, dict[str, object], str]:
    """(base address of the API, query, address to show)."""
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
            "an address with a password in it would end up in records",
            where="--endpoint",
            fix="put the key into an environment variable and name it with --key-env",
        )
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) or "/v1"
    base = urlunsplit(parts._replace(path=path, query="", fragment=""))
    return base, dict(parse_qsl(parts.query)), base + _COMPLETIONS


def _reply(answer: Any) -> Reply:
    """The first choice of a completion. The client does not check what a server sends."""
    try:
        found = answer.model_dump(warnings=False)
        choice = found["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UnansweredError("the response is not a chat completion") from error
    if isinstance(text, list):  # parts of a message
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    counts = {key: value for key, value in usage.items() if isinstance(value, int)}
    finish = choice.get("finish_reason")
    return Reply(text if isinstance(text, str) else "", counts, str(finish) if finish else None)


def _message(body: Any) -> str:
    """What an error's body says, in one line."""
    inner = body.get("error", body.get("message", "")) if isinstance(body, dict) else body
    said = inner.get("message", "") if isinstance(inner, dict) else inner
    return printable_line(str(said or "")[:1000])[:300]
