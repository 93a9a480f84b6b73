"""A language model behind an OpenAI-compatible service: `POST /chat/completions`.

One call is one answer or one typed failure; whoever calls decides whether to ask again. A service
that says how long to wait is obeyed by all calls together. The key comes from a file, travels in a
header, and is struck from everything that a service says.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylign.config import UserError

if TYPE_CHECKING:
    import httpx

_LONGEST_BODY = 8 << 20
_SHOWN = 200
_START_S = 10.0
# Statuses after which the same call may succeed.
_PASSING = {408, 409, 425, 429}
# Forms that a server can be asked to hold an answer to, best first.
_FORMS = ("json_schema", "json_object", "none")
_TOO_LONG = re.compile(r"(?i)context.(?:length|window)|too long")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    text: str
    finish_reason: str
    """`stop`, `length`, or what else the service says."""
    tokens: int
    """Of the answer; 0 when the service does not say."""


class CallFailed(RuntimeError):
    """A call without an answer, which may have one when it is made again."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """The service wants nothing before so many seconds."""


class CallRefused(ValueError):
    """What was asked cannot be answered, now or later."""


class QuestionTooLong(CallRefused):
    """Question and answer do not fit the model's context."""


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What this service understands, found out by asking."""

    form: str = _FORMS[0]
    limit: str = "max_tokens"
    seeded: bool = True

    def learn(self, fault: str) -> _Dialect | None:
        """What to try next when a service found such a fault with a request; None for nothing."""
        if self.limit == "max_tokens" and "max_completion_tokens" in fault:
            return replace(self, limit="max_completion_tokens")
        if self.seeded and re.search(r"\bseed\b", fault):
            return replace(self, seeded=False)
        if self.form != _FORMS[-1] and not _TOO_LONG.search(fault):
            return replace(self, form=_FORMS[_FORMS.index(self.form) + 1])
        return None


class Endpoint:
    """One model of one service. Calls may be made at the same time, from one event loop."""

    def __init__(self, url: str, model: str, key_file: Path | None, timeout_s: float) -> None:
        """`url` goes up to and including /v1; no call waits longer than `timeout_s`. Raises
        `UserError` for a URL that is none, or a key file that cannot be used."""
        self._timeout_s = timeout_s
        self._url, self._model = _check_url(url), model
        self._key = None if key_file is None else read_key(key_file)
        self._key_file = key_file
        self._client: httpx.AsyncClient | None = None
        self._dialect = _Dialect()
        self._resume = 0.0  # monotonic

    async def start(self) -> None:
        """Raises `UserError` when nothing listens there, or it does not take the key."""
        import httpx

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=None, limits=httpx.Limits(max_connections=None)
        )
        try:
            async with asyncio.timeout(_START_S):
                status, body, _ = await self._send("GET", "/models", None)
        except (httpx.HTTPError, TimeoutError) as error:
            await self.close()
            reason = self.redact(str(error)) or f"no answer in {_START_S:g} s"
            raise UserError(
                f"align.judge.endpoint={self._url}: cannot be reached ({reason}); start the "
                "service, or correct the URL"
            ) from None
        if status in (401, 403):
            await self.close()
            raise self._unauthorised(status, body)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def ask(
        self,
        question: str,
        schema: Mapping[str, Any] | None,
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> Reply:
        """One answer to `question`, held to the JSON `schema` where the service can do that.

        Raises `CallFailed` when it may help to ask again, `CallRefused` when the question is at
        fault, `UserError` for a key that is not taken or a model that is not there.
        """
        while (pause := self._resume - time.monotonic()) > 0:  # beside the deadline
            await asyncio.sleep(pause)
        dialect = self._dialect if schema is not None else replace(self._dialect, form=_FORMS[-1])
        while True:
            body: dict[str, Any] = {
                "model": self._model,
                "messages": [{"role": "user", "content": question}],
                "temperature": temperature,
                dialect.limit: max_tokens,
            }
            if dialect.seeded:
                body["seed"] = seed % 2**31
            if dialect.form == "json_object":
                body["response_format"] = {"type": "json_object"}
            elif dialect.form == "json_schema":
                form = {"name": "verdict", "strict": True, "schema": schema}
                body["response_format"] = {"type": "json_schema", "json_schema": form}
            status, answer, headers = await self._post(body)
            if status < 300:
                reply = _read_reply(answer)
                if schema is not None:
                    self._dialect = dialect  # only what has worked once is taken for granted
                return reply
            adapted = dialect.learn(answer) if status in (400, 404, 422) else None
            if adapted is None or _is_unknown_model(status, answer):
                raise self._fault(status, answer, headers)
            dialect = adapted

    def redact(self, text: str) -> str:
        """`text` in one short line, without the key or what looks like a part of one."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        text = re.sub(r"(?i)\b(?:sk-|bearer\s+)[^\s\"',;]+", "***", text)
        return " ".join(text.split())[:_SHOWN]

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, str, Mapping[str, str]]:
        import httpx

        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send("POST", "/chat/completions", body)
        except TimeoutError:
            raise CallFailed(f"no answer in {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            reason = self.redact(str(error)) or "connection lost"
            raise CallFailed(f"{type(error).__name__}: {reason}") from None

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, str, Mapping[str, str]]:
        """Status, body and headers of the answer."""
        assert self._client is not None, "start() first"
        async with self._client.stream(method, self._url + path, json=body) as response:
            received = bytearray()
            async for piece in response.aiter_bytes():
                received += piece
                if len(received) > _LONGEST_BODY:
                    raise CallFailed(f"an answer of over {_LONGEST_BODY >> 20} MiB")
            text = received.decode("utf-8", errors="replace")
            return response.status_code, text, response.headers

    def _fault(self, status: int, answer: str, headers: Mapping[str, str]) -> Exception:
        said = self.redact(_read_error(answer))
        if status in (401, 403):
            return self._unauthorised(status, answer)
        if _is_unknown_model(status, answer):
            return UserError(
                f"align.judge.endpoint_model={self._model!r}: {self._url} answers {status} "
                f"({said}); give the name of a model that it serves"
            )
        if status in _PASSING or status >= 500:
            wait = read_wait(headers.get("retry-after", ""), time.time())
            if 0 < wait <= self._timeout_s:
                self._resume = max(self._resume, time.monotonic() + wait)
            return CallFailed(f"HTTP {status}: {said}", wait)
        kind = QuestionTooLong if _TOO_LONG.search(answer) else CallRefused
        return kind(f"HTTP {status}: {said}")

    def _unauthorised(self, status: int, answer: str) -> UserError:
        said = self.redact(_read_error(answer))
        remedy = (
            "give the file of its key as align.judge.key_file"
            if self._key_file is None
            else f"check the key in align.judge.key_file={self._key_file}"
        )
        return UserError(
            f"align.judge.endpoint={self._url}: access denied (HTTP {status}: {said}); {remedy}"
        )


def read_key(file: Path) -> str:
    """The key in a file's only line. Raises `UserError`, which never shows what the file holds."""
    where = f"align.judge.key_file={file}"
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise UserError(f"{where} cannot be read ({reason}); correct the path") from None
    if len(lines) != 1 or not lines[0].isascii() or not lines[0].isprintable():
        raise UserError(f"{where}: must hold one key and nothing else; it holds {len(lines)} words")
    return lines[0]


def read_wait(header: str, now: float) -> float:
    """Seconds that a `Retry-After` header asks for, in seconds or as a date; 0 for no such."""
    header = header.strip()
    if re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", header):
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except (ValueError, TypeError, IndexError):
        return 0.0
    return max(moment.timestamp() - now, 0.0)


def _check_url(url: str) -> str:
    match = re.fullmatch(r"https?://([^/\s?#]+)(/[^\s?#]*)?", url)
    if match is not None and "@" in match[1]:
        raise UserError(
            "align.judge.endpoint: must not hold a user or a key; give a file as judge.key_file"
        )
    if match is None:
        raise UserError(
            f"align.judge.endpoint={url!r}: expected a URL such as http://localhost:8000/v1"
        )
    return url.rstrip("/")


def _is_unknown_model(status: int, answer: str) -> bool:
    return status == 404 and "response_format" not in answer


def _read_error(answer: str) -> str:
    """What an error's body says: of JSON the message, else its beginning."""
    try:
        found = json.loads(answer)
    except ValueError:
        return re.sub(r"<[^>]*>", " ", answer)
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message", error) if isinstance(error, dict) else error
    return message if isinstance(message, str) else json.dumps(message)


def _read_reply(answer: str) -> Reply:
    """Raises `CallFailed` for a body that is no answer."""
    try:
        found = json.loads(answer)
        choice = found["choices"][0]
        content = choice["message"].get("content")
        usage = found.get("usage") or {}
        tokens = usage.get("completion_tokens") or 0
        reason = choice.get("finish_reason") or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CallFailed("the body is no chat completion") from None
    if isinstance(content, list):  # in pieces
        pieces = [piece.get("text", "") for piece in content if isinstance(piece, dict)]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
    if not isinstance(content, str):
        content = ""  # it declined: no verdict, and nothing that failed
    return Reply(content, str(reason), tokens if isinstance(tokens, int) else 0)
