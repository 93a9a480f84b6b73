"""The client against a real service that refuses, is late, talks nonsense, or hangs up."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from raylign.config import UserError
from raylign.inference.endpoint import (
    CallFailed,
    CallRefused,
    Endpoint,
    QuestionTooLong,
    Reply,
    read_key,
    read_wait,
)
from tests.inference.service import Asked, Service, Told, serve

KEY = "token-secret-0123456789"
SCHEMA = {"type": "object", "properties": {}}


def answer_in_turn(*turns: Told) -> Callable[[Asked], Told]:
    """The last of `turns` again and again."""
    left = list(turns)
    return lambda asked: left.pop(0) if len(left) > 1 else left[0]


def play(
    service: Service,
    scenario: Callable[[Endpoint], Coroutine[Any, Any, Any]],
    key_file: Path | None = None,
    timeout_s: float = 30.0,
) -> Any:
    async def whole() -> Any:
        endpoint = Endpoint(service.url, "judge-1", key_file, timeout_s)
        await endpoint.start()
        try:
            return await scenario(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(whole())


async def ask(endpoint: Endpoint, question: str = "Why?", schema: Any = SCHEMA) -> Reply:
    return await endpoint.ask(question, schema, temperature=0.5, max_tokens=7, seed=2**40 + 5)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    return file


def test_a_call_says_what_was_configured(key_file: Path) -> None:
    with serve(answer_in_turn(Told("Because."))) as service:
        assert play(service, ask, key_file) == Reply("Because.", "stop", 3)
    [asked] = service.asked
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    form = asked.body.pop("response_format")
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == SCHEMA
    assert asked.body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "Why?"}],
        "temperature": 0.5,
        "max_tokens": 7,
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (Told(status=500, body="<html><b>oops</b></html>"), "HTTP 500: oops"),
        (Told(status=503, body='{"error": {"message": "loading"}}'), "HTTP 503: loading"),
        (Told(status=429, body='{"message": "slow down"}'), "HTTP 429: slow down"),
        (Told(seconds=0.6), "no answer in 0.3 s"),
        (Told(dropped=True), "disconnected|ReadError"),
        (Told(body="not JSON"), "no chat completion"),
        (Told(body='{"choices": []}'), "no chat completion"),
        (Told(body='{"choices": [{"message": null}]}'), "no chat completion"),
        (Told(body="[1]"), "no chat completion"),
        (Told(body=" " * (9 << 20)), "over 8 MiB"),
    ],
)
def test_what_may_pass_is_a_failed_call(told: Told, says: str) -> None:
    with serve(answer_in_turn(told)) as service, pytest.raises(CallFailed, match=says):
        play(service, ask, timeout_s=0.3 if told.seconds else 30.0)
    assert len(service.asked) == 1


def test_declining_is_an_answer_without_text_and_pieces_are_joined() -> None:
    declined = json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}}]})
    pieces = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    in_pieces = json.dumps({"choices": [{"message": {"content": pieces}}]})

    async def scenario(endpoint: Endpoint) -> list[str]:
        return [(await ask(endpoint)).text for _ in range(2)]

    with serve(answer_in_turn(Told(body=declined), Told(body=in_pieces))) as service:
        assert play(service, scenario) == ["", "ab"]


def test_a_service_that_wants_a_pause_gets_it_from_all_calls() -> None:
    busy = Told(status=429, headers={"Retry-After": "0.4"}, body="{}")

    async def scenario(endpoint: Endpoint) -> float:
        with pytest.raises(CallFailed) as raised:
            await ask(endpoint)
        await asyncio.gather(*(ask(endpoint) for _ in range(3)))
        return raised.value.wait_s

    with serve(answer_in_turn(busy, Told("x"))) as service:
        assert play(service, scenario) == 0.4
    first, *others = [asked.time for asked in service.asked]
    assert len(others) == 3 and all(moment - first >= 0.39 for moment in others)


def test_it_learns_what_a_service_understands() -> None:
    def tell(asked: Asked) -> Told:
        form = asked.body.get("response_format", {}).get("type")
        if "max_tokens" in asked.body:
            return Told(status=400, body="Use 'max_completion_tokens' instead of max_tokens.")
        if "seed" in asked.body:
            return Told(status=422, body="extra field: seed")
        if form is not None:
            return Told(status=400, body=f"response_format {form} is not supported")
        return Told("yes")

    async def scenario(endpoint: Endpoint) -> None:
        assert (await ask(endpoint)).text == (await ask(endpoint)).text == "yes"

    with serve(tell) as service:
        play(service, scenario)
    assert len(service.asked) == 6  # five to learn, one from then on
    assert service.asked[-1].body["max_completion_tokens"] == 7


def test_a_question_at_fault_is_refused_and_nothing_is_learned() -> None:
    too_long = Told(status=400, body="maximum context length is 10 tokens, you asked for 12")
    bad = Told(status=400, body="content was flagged")

    async def scenario(endpoint: Endpoint) -> None:
        with pytest.raises(QuestionTooLong, match="context length is 10"):
            await ask(endpoint)
        assert len(service.asked) == 1
        with pytest.raises(CallRefused, match="HTTP 400: content was flagged"):
            await ask(endpoint)
        assert (await ask(endpoint)).text == "fine"

    with serve(answer_in_turn(too_long, bad, bad, bad, Told("fine"))) as service:
        play(service, scenario)
    assert service.asked[-1].body["response_format"]["type"] == "json_schema"


def test_no_key_and_no_model_end_the_run_and_show_no_key(key_file: Path) -> None:
    denied = json.dumps({"error": {"message": f"Incorrect key {KEY} (sk-sec***89)", "code": 1}})
    with serve(answer_in_turn(Told(status=401, body=denied))) as service:
        with pytest.raises(UserError, match=r"access denied .HTTP 401: Incorrect key") as raised:
            play(service, ask, key_file)
        assert f"judge.key_file={key_file}" in str(raised.value)
        assert KEY not in str(raised.value) and "sk-" not in str(raised.value)
        assert len(service.asked) == 1
        service.models_status = 403
        with pytest.raises(UserError, match=r"give the file of its key as align.judge.key_file"):
            play(service, ask)
    missing = json.dumps({"error": {"message": "model judge-1 does not exist"}})
    with serve(answer_in_turn(Told(status=404, body=missing))) as service:
        with pytest.raises(UserError, match=r"endpoint_model='judge-1'.*does not exist"):
            play(service, ask)
        assert len(service.asked) == 1


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"align.judge.endpoint=.*cannot be reached") as raised:
        asyncio.run(Endpoint(url, "m", None, 1.0).start())
    assert "\n" not in str(raised.value) and time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://a b/v1"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UserError, match=r"align.judge.endpoint=.*expected a URL"):
        Endpoint(url, "m", None, 1.0)


def test_secrets_do_not_belong_into_a_url() -> None:
    with pytest.raises(UserError, match="must not hold a user or a key") as raised:
        Endpoint(f"https://me:{KEY}@host/v1", "m", None, 1.0)
    assert KEY not in str(raised.value)


def test_key_files(tmp_path: Path, key_file: Path) -> None:
    assert read_key(key_file) == KEY
    for number, content in enumerate(["", "two words", f"{KEY}\n{KEY}", "k\u00e9y", "a\x00b"]):
        file = tmp_path / f"bad-{number}"
        file.write_text(content)
        with pytest.raises(UserError, match="must hold one key and nothing else") as raised:
            read_key(file)
        assert KEY not in str(raised.value)
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0.0),
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("-3", 0.0),
        ("soon", 0.0),
        ("1e9", 0.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:01:00 GMT", 0.0),
    ],
)
def test_how_long_to_wait(header: str, seconds: float) -> None:
    assert read_wait(header, now=100.0) == seconds
