"""A thread that owns a generator, so that many callers can share it.

Requests from any thread join the running batch; other work (a weight update with its proof) runs
between two scheduling steps. What such work finishes on the side is handed out only after it
succeeded, so nothing sampled under unproved weights gets away.

Requests handed over together and `ordered` are all there before the next step is made, nothing
cached before them is used, and answers to their turns are awaited in order: what is sampled for
them, to the bit, depends on the weights and on themselves alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from raylign.inference.episode import Episode, Reply, Responder
from raylign.inference.generator import Generator, Sample, Sampling, fresh_keys

T = TypeVar("T")

ANSWERING_THREADS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Completions of a prompt that are wanted."""

    prompt: tuple[int, ...]
    sampling: Sampling
    count: int = 1
    respond: Callable[[], Responder] | None = None
    """Who answers an episode's turns; episodes have one turn when not given."""
    begun: tuple[Episode, ...] = ()
    """What is there of each completion already."""


@dataclass(slots=True, eq=False)
class _Group:
    """A request being served."""

    request: Request
    future: Future[tuple[Episode, ...]]
    ordered: bool
    lines: list[_Line] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Line:
    """One completion being made."""

    group: _Group
    index: int
    turns: list[Sample] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    partial: Sample | None = None
    """What is there of the turn to come."""
    responder: Responder | None = None
    key: str | None = None
    """Of the turn being sampled."""
    answer: Future[Reply | None] | None = None
    """To the last turn, when it is awaited."""
    done: bool = False

    def freeze(self) -> Episode:
        turns = self.turns + ([self.partial] if self.partial else [])
        return Episode(tuple(turns), tuple(self.replies))


@dataclass(frozen=True, slots=True)
class _Parcel:
    groups: list[_Group]
    ordered: bool


@dataclass(frozen=True, slots=True)
class _Answered:
    line: _Line
    answer: Future[Reply | None]


@dataclass(frozen=True, slots=True)
class _Call:
    work: Callable[[Generator], Any]
    restart: bool
    future: Future[Any]


class GeneratorLoop:
    """Runs one generator in one thread until `close`."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._inbox: queue.SimpleQueue[_Parcel | _Answered | _Call | None] = queue.SimpleQueue()
        self._groups: dict[Future[tuple[Episode, ...]], _Group] = {}
        self._lines: dict[str, _Line] = {}
        self._awaited: list[_Line] = []  # of ordered groups, in order
        self._keys = iter(fresh_keys("g"))
        self._answering: ThreadPoolExecutor | None = None
        self._working = False
        self._unanswered, self._counting = 0, threading.Lock()
        self.steps = 0
        """Scheduling steps made."""
        self.failure: BaseException | None = None
        """What ended the loop."""
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it does a caller's work, or waits for answers to turns, in place of steps."""
        return self._working or (self._unanswered > 0 and not self._generator.pending)

    def submit(
        self, requests: Sequence[Request], ordered: bool = False
    ) -> list[Future[tuple[Episode, ...]]]:
        """Queue requests; a future fails with `ValueError` if its prompt cannot be served."""
        groups = [_Group(request, Future(), ordered) for request in requests]
        parcel = _Parcel(groups, ordered)
        self._post(parcel, [group.future for group in groups])
        return [group.future for group in groups]

    def withdraw(
        self, futures: Iterable[Future[tuple[Episode, ...]]]
    ) -> Future[list[tuple[Episode, ...] | None]]:
        """Take requests back: what is there of each, or None where it was complete already. Their
        own futures are cancelled."""
        wanted = list(futures)
        return self.call(lambda generator: [self._take_back(future) for future in wanted])

    def call(self, work: Callable[[Generator], T], restart: bool = False) -> Future[T]:
        """Run `work(generator)` between two steps; with `restart`, completions that are not done
        then start over. If it raises, the loop is over: the generator may be half changed, so every
        open and later request fails with the same error."""
        future: Future[T] = Future()
        self._post(_Call(work, restart, future), [future])
        return future

    def close(self) -> None:
        """Finish nothing more, and stop the thread."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _post(self, item: _Parcel | _Call, futures: Sequence[Future[Any]]) -> None:
        if self.failure is not None:
            for future in futures:
                future.set_exception(self.failure)
        else:
            self._inbox.put(item)

    def _run(self) -> None:
        try:
            while self._drain():
                if self._generator.pending:
                    for key, [sample] in self._generator.advance():
                        self._end_turn(self._lines.pop(key), sample)
                    self.steps += 1
        except BaseException as error:  # the edge of a thread: whoever waits must hear of it
            self._fail(error)
        else:
            self._fail(RuntimeError("the generator was closed"))

    def _drain(self) -> bool:
        """Handle what has arrived, waiting only when there is nothing to generate."""
        while True:
            for line in self._take_awaited():
                assert line.answer is not None
                self._working = True
                reply = line.answer.result()
                self._working = False
                self._hear(line, reply)
            try:
                item = self._inbox.get(block=not self._generator.pending)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, _Call):
                self._perform(item)
            elif isinstance(item, _Parcel):
                self._enqueue(item)
            elif item.line.answer is item.answer:  # else the episode was taken back meanwhile
                self._hear(item.line, item.answer.result())

    def _take_awaited(self) -> list[_Line]:
        awaited, self._awaited = self._awaited, []
        return awaited

    def _enqueue(self, parcel: _Parcel) -> None:
        if parcel.ordered and not self._groups:
            self._generator.forget()
        for group in parcel.groups:
            request = group.request
            group.lines = [_Line(group, index) for index in range(request.count)]
            self._groups[group.future] = group
            try:
                self._check(request)
                for line in group.lines:
                    self._begin(line, request.begun[line.index] if request.begun else Episode())
            except ValueError as error:  # this request's fault alone
                self._drop(group)
                group.future.set_exception(error)
            else:
                self._settle(group)

    def _check(self, request: Request) -> None:
        length, most = len(request.prompt), self._generator.max_length
        if length >= most:
            raise ValueError(f"the prompt has {length} tokens; the context holds {most}")

    def _begin(self, line: _Line, begun: Episode) -> None:
        """Take an episode up where it was left."""
        line.responder = line.group.request.respond() if line.group.request.respond else None
        line.turns, line.replies = list(begun.turns), list(begun.replies)
        if line.turns and line.turns[-1].finish_reason == "abort":
            line.partial = line.turns.pop()
        ended = len(line.replies) == len(line.turns) > 0 and line.replies[-1].tokens is None
        if ended or (line.turns and line.responder is None):
            line.done = True
        elif line.turns:
            self._ask(line, replay=True)
        else:
            self._next_turn(line)

    def _next_turn(self, line: _Line) -> None:
        request, said = line.group.request, Episode(tuple(line.turns), tuple(line.replies))
        prompt = (*request.prompt, *said.listing())
        if len(prompt) >= self._generator.max_length:
            line.replies[-1] = replace(line.replies[-1], tokens=None, cut=True)
            line.done = True
            return
        # Completions and turns differ in their seeds; the generator adds the tokens drawn so far.
        own = request.sampling.seed_of(line.index, len(line.turns))
        key = next(self._keys)
        partial = [line.partial] if line.partial else None
        sampling = replace(request.sampling, seed=own)
        self._generator.submit(key, prompt, sampling, 1, partial)
        self._lines[key], line.key = line, key
        line.partial = None

    def _end_turn(self, line: _Line, sample: Sample) -> None:
        line.key = None
        line.turns.append(sample)
        if line.responder is None:
            line.done = True
            self._settle(line.group)
        else:
            self._ask(line)

    def _ask(self, line: _Line, replay: bool = False) -> None:
        """Have the last turn answered, aside; in a replay, the ones before it too."""
        if self._answering is None:
            self._answering = ThreadPoolExecutor(ANSWERING_THREADS, "answering")
        assert line.responder is not None
        turns, replies = tuple(line.turns), tuple(line.replies) if replay else None
        answer = self._answering.submit(_answer, line.responder, turns, replies)
        self._count_unanswered(1)
        answer.add_done_callback(lambda done: self._count_unanswered(-1))
        line.answer = answer
        if line.group.ordered:
            self._awaited.append(line)
        else:
            answer.add_done_callback(lambda done: self._inbox.put(_Answered(line, answer)))

    def _count_unanswered(self, change: int) -> None:
        with self._counting:
            self._unanswered += change

    def _hear(self, line: _Line, reply: Reply | None) -> None:
        line.answer = None
        if reply is None:  # it does not answer as it did: what was sampled since has no ground
            line.partial = None
            self._begin(line, Episode())
            return
        line.replies[len(line.turns) - 1 :] = [reply]
        if reply.tokens is None or reply.failure:
            line.done = True
        else:
            self._next_turn(line)
        self._settle(line.group)

    def _settle(self, group: _Group) -> None:
        """Hand a group out once all of it is there."""
        if all(line.done for line in group.lines):
            del self._groups[group.future]
            group.future.set_result(tuple(line.freeze() for line in group.lines))

    def _halt(self, line: _Line) -> None:
        """Stop a completion that is being made, keeping what is there of it."""
        if line.key is not None:
            [line.partial] = self._generator.abort(line.key)
            del self._lines[line.key]
            line.key = None
        line.answer = None

    def _drop(self, group: _Group) -> None:
        """Serve a request no longer."""
        for line in group.lines:
            self._halt(line)
        self._awaited = [line for line in self._awaited if line.group is not group]
        del self._groups[group.future]

    def _take_back(self, future: Future[tuple[Episode, ...]]) -> tuple[Episode, ...] | None:
        group = self._groups.get(future)
        if group is None:
            return None
        self._drop(group)
        future.cancel()
        return tuple(line.freeze() for line in group.lines)

    def _perform(self, call: _Call) -> None:
        self._working = True
        try:
            stopped = []
            if call.restart:
                groups = self._groups.values()
                stopped = [line for group in groups for line in group.lines if not line.done]
            for line in stopped:
                self._halt(line)
            result = call.work(self._generator)
        except BaseException as error:
            call.future.set_exception(error)
            raise
        self._working = False
        self._awaited = [line for line in self._awaited if line not in stopped]
        for line in stopped:
            line.partial = None
            self._begin(line, Episode())
        call.future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for future in self._groups:
            future.set_exception(error)
        self._groups.clear()
        if self._answering is not None:
            self._answering.shutdown(wait=False, cancel_futures=True)
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, _Parcel):
                for group in item.groups:
                    group.future.set_exception(error)
            elif isinstance(item, _Call):
                item.future.set_exception(error)


def _answer(
    responder: Responder, turns: tuple[Sample, ...], replies: tuple[Reply, ...] | None
) -> Reply | None:
    """The answer to the last turn. Given the `replies` to the turns before, all turns are gone
    through again; None if one of the answers is not what it was."""
    if replies is None:
        return responder.reply(turns[-1])
    answers = [responder.reply(turn) for turn in turns]
    return answers[-1] if answers[: len(replies)] == list(replies) else None
