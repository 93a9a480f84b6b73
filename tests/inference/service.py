"""A chat service on this machine that answers, and misbehaves, as a test tells it to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to /chat/completions."""

    body: dict[str, Any]
    headers: dict[str, str]
    time: float

    @property
    def question(self) -> str:
        text: str = self.body["messages"][0]["content"]
        return text


@dataclass(frozen=True, slots=True)
class Told:
    """What the service does about it."""

    text: str = ""
    """Of the answer, where the status is 200 and there is no `body`."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    seconds: float = 0.0
    """It takes."""
    dropped: bool = False
    """The connection, without an answer."""


class Service:
    """What was asked, and how much at once."""

    def __init__(self, tell: Callable[[Asked], Told]) -> None:
        self.tell = tell
        self.asked: list[Asked] = []
        self.most_at_once = self._now = 0
        self.models_status = 200
        self.lock = threading.Lock()
        self.url = ""

    def questions(self) -> list[str]:
        return [asked.question for asked in self.asked]

    def take(self, asked: Asked) -> Told:
        with self.lock:
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            told = self.tell(asked)
        time.sleep(told.seconds)
        with self.lock:
            self._now -= 1
        return told


@contextmanager
def serve(tell: Callable[[Asked], Told]) -> Iterator[Service]:
    """A service on a free port of the loopback interface, for as long as the block lasts."""
    service = Service(tell)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(Told(status=service.models_status, body='{"data": []}'))

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            asked = Asked(json.loads(self.rfile.read(size)), dict(self.headers), time.monotonic())
            told = service.take(asked)
            if told.dropped:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self._send(told)

        def _send(self, told: Told) -> None:
            body = told.body
            if body is None:
                message = {"role": "assistant", "content": told.text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})
            try:
                self.send_response(told.status)
                for name, value in told.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())
            except OSError:  # whoever asked has gone
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
