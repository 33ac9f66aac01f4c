"""Requests to a real server: what is sent, and how each failure is handled."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from support.judge_server import Response, always_answer, judge_server

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.judge.endpoint import Endpoint, UnansweredError

BODY = {"model": "m", "messages": [{"role": "user", "content": "é😀"}], "temperature": 0}
KEY = "sk-secret-123"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-the-user")


def endpoint(url: str, key: str | None = KEY, **settings: Any) -> Endpoint:
    chosen = {"timeout": 5.0, "retries": 1, **settings}
    return Endpoint(url, key=key, **chosen)


def test_a_request_has_the_body_and_headers_of_the_api() -> None:
    with judge_server(always_answer("Rating: [[7]]")) as server:
        reply = endpoint(server.url).ask(BODY)
        endpoint(f"{server.url}/chat/completions", key=None).ask(BODY)
        endpoint(server.url.removesuffix("/v1")).ask(BODY)
        endpoint(server.url.replace("/v1", "/api/v4?version=2")).ask(BODY)
    assert (reply.text, reply.finish, reply.usage) == ("Rating: [[7]]", "stop", {"total_tokens": 7})
    first, second, third, fourth = server.requests
    assert first["body"] == {**BODY, "messages": [{"role": "user", "content": "é😀"}]}
    assert first["headers"]["authorization"] == f"Bearer {KEY}"
    assert [r["path"] for r in (first, second, third)] == ["/v1/chat/completions"] * 3
    assert fourth["path"] == "/api/v4/chat/completions?version=2"
    # Without a key nothing is sent in its place, the token of the Hugging Face hub least of all.
    assert "authorization" not in second["headers"]
    assert "of_the_user" not in str(server.requests)
    assert "of-the-user" not in str(server.requests)


def test_http_429_is_retried_after_the_time_that_the_server_asks() -> None:
    wait = (("Retry-After", "1"),)
    with judge_server(
        lambda b, n: Response("ok") if n else Response(status=429, headers=wait)
    ) as server:
        started = time.monotonic()
        assert endpoint(server.url).ask(BODY).text == "ok"
        assert time.monotonic() - started >= 1
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("said", "reason", "tries"),
    [
        (Response(status=500, body=b'{"error": {"message": "boom"}}'), "HTTP 500: boom", 2),
        (Response(status=503, body=b"<html><b>down</b></html>"), "HTTP 503: <html><b>down", 2),
        (Response("cut", cut=True), "network: ", 2),
        (Response("late", delay=1.0), "no answer within 0.3 s", 2),
        (Response(body=b"<html>it works</html>"), "not a chat completion", 1),
        (Response(body=b'{"choices": []}'), "not a chat completion", 1),
        (Response(body=b'{"choices": [{"message": null}]}'), "not a chat completion", 1),
        (Response(status=400, body=b'{"error": "context too long"}'), "400: context too long", 1),
        (Response(status=422, body=b"\xff\xfe"), "HTTP 422", 1),
    ],
)
def test_temporary_failures_are_retried(said: Response, reason: str, tries: int) -> None:
    with judge_server(lambda body, number: said) as server:
        with pytest.raises(UnansweredError, match=re.escape(reason)):
            endpoint(server.url, timeout=0.3).ask(BODY)
        assert len(server.requests) == tries


def test_a_closed_port_is_a_network_error() -> None:
    with judge_server(always_answer("")) as server:
        pass
    with pytest.raises(UnansweredError, match=r"network: .*refused"):
        endpoint(server.url).ask(BODY)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_failures_stop_at_once(status: int) -> None:
    body = f'{{"error": {{"message": "wrong\\u001b[2J key {KEY}"}}}}'.encode()
    with judge_server(lambda b, n: Response(status=status, body=body)) as server:
        with pytest.raises(SparsegradError, match=f"HTTP {status}: wrong .2J key .key.") as caught:
            endpoint(server.url).ask(BODY)
        assert len(server.requests) == 1
    assert KEY not in str(caught.value) and "--key-env" in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with judge_server(always_answer("stolen")) as other:
        there = (("Location", f"{other.url}/chat/completions"),)
        with (
            judge_server(lambda b, n: Response(status=status, headers=there)) as server,
            pytest.raises(SparsegradError, match="redirect"),
        ):
            endpoint(server.url).ask(BODY)
    assert other.requests == []


def test_unusual_but_valid_replies_are_read() -> None:
    parts = (
        b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]}'
    )
    empty = b'{"choices": [{"message": {"content": null}}], "usage": 3}'
    with judge_server(lambda b, n: Response(body=(parts, empty)[n])) as server:
        judge = endpoint(server.url)
        assert judge.ask(BODY).text == "ab"
        reply = judge.ask(BODY)
        assert (reply.text, reply.usage, reply.finish) == ("", {}, None)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://[::1/v1",
        "http://host:0/v1",
        "http://host:99999999/v1",
        "http://ho st/v1",
        "http://host/\x1b[31m",
        "http://hôst/v1",
        "http://user:sk-1@host/v1",
    ],
)
def test_invalid_addresses_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        endpoint(url)
    assert caught.value.where == "--endpoint"
    assert "sk-1" not in str(caught.value)


def test_the_shown_address_has_no_query() -> None:
    assert endpoint("https://host:8/v1/?key=sk-1#x").shown == "https://host:8/v1/chat/completions"


@pytest.mark.parametrize("key", ["sk-1\r\nHost: evil", "clé"])
def test_a_key_that_is_invalid_in_a_header_is_refused(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        endpoint("http://localhost/v1", key=key)
    assert key not in str(caught.value)
