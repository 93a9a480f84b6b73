"""A thread that owns a generator, so that many callers can share it.

Requests from any thread join the running batch; other work (a weight update with its proof) runs
between two scheduling steps. What such work finishes on the side is handed out only after it
succeeded, so nothing sampled under unproved weights gets away.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from raylign.inference.generator import Generator, Sample, Sampling, fresh_keys

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    count: int
    future: Future[list[Sample]]


@dataclass(frozen=True, slots=True)
class _Call:
    work: Callable[[Generator], Any]
    future: Future[Any]


class GeneratorLoop:
    """Runs one generator in one thread until `close`."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._inbox: queue.SimpleQueue[_Request | _Call | None] = queue.SimpleQueue()
        self._futures: dict[str, Future[list[Sample]]] = {}
        self._keys = iter(fresh_keys("g"))
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, count: int = 1
    ) -> Future[list[Sample]]:
        """Queue `count` completions; the future fails if the prompt cannot be served."""
        future: Future[list[Sample]] = Future()
        self._post(_Request(tuple(prompt), sampling, count, future))
        return future

    def call(self, work: Callable[[Generator], T]) -> Future[T]:
        """Run `work(generator)` between two steps. If it raises, the loop is over: the generator
        may be half changed, so every open and later request fails with the same error."""
        future: Future[T] = Future()
        self._post(_Call(work, future))
        return future

    def close(self) -> None:
        """Finish nothing more, and stop the thread."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _post(self, item: _Request | _Call) -> None:
        if self._failure is not None:
            item.future.set_exception(self._failure)
        else:
            self._inbox.put(item)

    def _run(self) -> None:
        try:
            while self._drain():
                if self._generator.pending:
                    for key, samples in self._generator.advance():
                        self._futures.pop(key).set_result(samples)
        except BaseException as error:  # the edge of a thread: whoever waits must hear of it
            self._fail(error)
        else:
            self._fail(RuntimeError("the generator was closed"))

    def _drain(self) -> bool:
        """Handle what has arrived, waiting only when there is nothing to generate."""
        while True:
            try:
                item = self._inbox.get(block=not self._generator.pending)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, _Call):
                self._perform(item)
            else:
                self._enqueue(item)

    def _enqueue(self, request: _Request) -> None:
        key = next(self._keys)
        try:
            self._generator.submit(key, request.prompt, request.sampling, request.count)
        except ValueError as error:  # this prompt's fault alone
            request.future.set_exception(error)
            return
        self._futures[key] = request.future

    def _perform(self, call: _Call) -> None:
        try:
            result = call.work(self._generator)
        except BaseException as error:
            call.future.set_exception(error)
            raise
        call.future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for future in self._futures.values():
            future.set_exception(error)
        self._futures.clear()
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item.future.set_exception(error)
