"""The elastic pool that hands requests to rollout workers.

Every worker has one task here: it waits until the worker has loaded, has it prove the current
version, lets it serve, and listens to its pulse. A worker that dies, falls silent, makes no token,
or does not prove a version in time is killed, its requests are made again by others, and, within a
budget, a successor is started beside them: nobody waits for it. A worker that is let go gives back
what it has sampled, and others go on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

from ray.actor import ActorHandle

from actors.rollout import Answer, Rollout, RolloutRequest
from actors.rollout_member import LOST, Member, Parcel, Work
from actors.rollout_queue import IdleClock, RolloutQueue
from actors.supervision import Budget, BudgetSpent, FleetExhausted, describe
from actors.weights import SyncProof, WeightManifest
from raylign.config import RolloutConfig, TransferConfig, UserError
from raylign.inference.generator import Sampling
from raylign.records import Prompt
from raylign.training.buckets import SyncError

log = logging.getLogger(__name__)

Errand = Callable[[], Coroutine[Any, Any, None]]
"""Begun where it is awaited: a loop that ends before that leaves nothing half begun."""


class RolloutPool:
    """The rollout workers of a run."""

    def __init__(
        self,
        config: RolloutConfig,
        spawn: Callable[[str], ActorHandle],
        on_sync: Callable[[str, SyncProof], None],
        *,
        role: str = "rollout",
        in_flight: Literal["continue", "restart"] = "continue",
        transfer_deadline_s: float = TransferConfig().deadline_s,
        canary_tolerance: float = 1e-2,
        on_change: Callable[[str, str, str], None] = lambda worker, what, reason: None,
    ) -> None:
        """`spawn` starts a worker of the given name, which begins with `role`; `on_sync` hears of
        every proved sync, and `on_change` of every worker that is `started`, `serves`, is `lost` or
        `removed`, and why."""
        self._config, self._spawn, self._on_sync = config, spawn, on_sync
        self._restart, self._transfer_deadline_s = in_flight == "restart", transfer_deadline_s
        self._canary_tolerance = canary_tolerance
        self._on_change, self._role = on_change, role
        self._members: dict[str, Member] = {}
        self._born = self._target = 0
        self._first: list[asyncio.Future[str]] = []
        self._manifest: WeightManifest | None = None
        self._queue = RolloutQueue(config.max_sequences, config.attempts)
        self._placing = False
        self._scaling = asyncio.Lock()
        self._budget = Budget(f"{role} worker", config.max_restarts)
        self._fatal: BaseException | None = None
        self._signal = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = IdleClock()

    def begin(self) -> None:
        """Let the configured number of workers load; they serve once there are weights."""
        self._target = self._config.count
        self._first = [self._enlist().born for _ in range(self._target)]

    async def start(self, manifest: WeightManifest) -> None:
        """Prove the first policy version on every worker. Raises `BudgetSpent` when too many had
        to be replaced."""
        self._manifest = manifest
        self._announce()
        if not self._first:
            self.begin()
        await asyncio.gather(*self._first)

    async def publish(self, manifest: WeightManifest) -> None:
        """Bring every worker to a new version; returns when all that serve have proved it, and one
        at least does. Whoever fails to is replaced meanwhile. Raises `FleetExhausted`."""
        self._manifest = manifest
        self._announce()
        serving = [member for member in self._members.values() if member.serving]
        await asyncio.gather(*(self._guard(m, partial(self._prove, m)) for m in serving))
        while not any(m.version >= manifest.version for m in self._members.values()):
            if self._fatal is not None:
                raise self._fatal
            await self._signal.wait()

    async def generate(
        self, prompt: Prompt, group: str, sampling: Sampling, count: int, oldest: int
    ) -> Rollout:
        """`count` completions by a worker that has proved version `oldest` or a later one.

        What a lost worker had of it is made again. Raises `PromptLost` when that happens
        `attempts` times, `FleetExhausted` when no worker is left, `ValueError` when the prompt is
        at fault.
        """
        work = self._accept(RolloutRequest(prompt, group, sampling, count, oldest))
        self._queue.add(Parcel([work]))
        self._place_soon()
        return await work.future

    def deal(self, requests: Sequence[RolloutRequest]) -> list[asyncio.Future[Rollout]]:
        """Completions that are the same to the bit whenever they are asked for, given the weights,
        the requests in their order, their seeds, and the number of workers.

        Request i is in share i mod workers; a share is handed to an idle worker as a whole. When
        that is lost, the whole share is made again, by a worker that does nothing else. Results
        come one by one, and raise as in `generate`.
        """
        works = [self._accept(request) for request in requests]
        for share in range(self._target):
            if own := works[share :: self._target]:
                self._queue.add(Parcel(own, ordered=True))
        self._place_soon()
        return [work.future for work in works]

    async def scale(self, count: int) -> str:
        """Have `count` workers; what was done, in words. Newcomers serve once they have proved the
        current version; of the others, the newest go, and what they had in flight goes on
        elsewhere.

        Raises `UserError` for less than one worker, or when newcomers do not come to serve.
        """
        if count < 1:
            raise UserError(f"{self._role}s={count}: at least 1 worker must stay")
        async with self._scaling:
            before, self._target = len(self.names), count
            if count > before:
                newcomers = [self._enlist(optional=True).born for _ in range(count - before)]
                found = await asyncio.gather(*newcomers, return_exceptions=True)
                errors = [str(error) for error in found if isinstance(error, BaseException)]
                if errors:
                    raise UserError(
                        f"{self._role}s={count}: {len(errors)} of {len(found)} new workers did not "
                        f"come to serve, {len(self.names)} do ({errors[0]})"
                    )
            else:
                able = [m for m in self._members.values() if not m.draining]
                able.sort(key=lambda m: (m.serving, -m.number))
                await asyncio.gather(*(self._drain(m) for m in able[: before - count]))
            return f"{before} -> {len(self.names)} workers"

    def scale_soon(self, count: int) -> None:
        """Begin to `scale`; what goes wrong is logged."""

        async def attempt() -> None:
            try:
                await self.scale(count)
            except (UserError, BudgetSpent) as error:
                log.warning("scaling %s workers: %s", self._role, error)

        self._launch(attempt())

    async def add(self) -> str:
        """One more worker; returns the name of the one that came to serve."""
        async with self._scaling:
            self._target += 1
            return await self._enlist().born

    async def remove(self, name: str) -> None:
        """Let a worker go; what it has in flight goes on elsewhere. Raises `KeyError` for a worker
        that is not there, `UserError` for the last one."""
        async with self._scaling:
            member = self._members[name]
            if len(self.names) < 2:
                raise UserError(f"{name} is the last {self._role} worker; at least 1 must stay")
            self._target -= 1
            await self._drain(member)

    @property
    def names(self) -> list[str]:
        """Workers, but those that are being let go."""
        return [member.name for member in self._members.values() if not member.draining]

    @property
    def restarts(self) -> int:
        """Workers that were lost so far."""
        return len(self._budget.reasons)

    def take_idle_seconds(self) -> float:
        """Seconds without any group in flight since the last call."""
        return self._idle.take()

    def stop(self) -> None:
        """Kill all workers."""
        for task in self._tasks:
            task.cancel()
        for member in self._members.values():
            member.kill()
        self._members.clear()

    # A worker's life.

    def _enlist(self, optional: bool = False, born: asyncio.Future[str] | None = None) -> Member:
        """Start a worker, or the successor of one, which `born` waits for."""
        if self._fatal is not None:
            raise self._fatal
        name = f"{self._role}-{self._born}"
        member = Member(name, self._born, self._spawn(name), optional)
        if born is not None:
            member.born = born
        self._born += 1
        self._members[name] = member
        self._on_change(name, "started", "")
        member.task = self._launch(self._guard(member, partial(self._attend, member)))
        return member

    async def _attend(self, member: Member) -> None:
        await member.wake(self._config.start_deadline_s)
        await self._prove(member)
        member.serving = True
        if not member.born.done():
            member.born.set_result(member.name)
        self._on_change(member.name, "serves", "")
        self._announce()
        await member.watch(self._config.stall_s, self._hear)

    async def _guard(self, member: Member, errand: Errand) -> None:
        """A worker that fails an errand is given up."""
        try:
            await errand()
        except LOST as error:
            self._lose(member, error)

    async def _prove(self, member: Member) -> None:
        while self._manifest is None:
            await self._signal.wait()
        async with member.sync:
            while member.version < self._manifest.version:
                proof = await member.adopt(
                    self._manifest,
                    self._canary_tolerance,
                    self._restart,
                    self._transfer_deadline_s,
                )
                self._on_sync(member.name, proof)
        self._announce()

    async def _drain(self, member: Member) -> None:
        member.draining = True
        if not member.born.done():
            member.born.set_result(member.name)
        try:
            async with asyncio.timeout(self._config.stall_s):
                if member.work:
                    await member.withdraw(list(member.work))
                while member.work:
                    await self._signal.wait()
        except LOST as error:
            self._lose(member, error)
            return
        if self._members.pop(member.name, None) is not None:
            member.kill()
            self._on_change(member.name, "removed", "")

    def _lose(self, member: Member, error: BaseException) -> None:
        """Give a worker up, once; its requests are made again."""
        if self._members.get(member.name) is not member:
            return
        del self._members[member.name]
        member.kill()
        reason = f"{member.name}: {describe(error)}"
        self._on_change(member.name, "lost", reason)
        parcel, works = member.parcel, member.blame(reason)
        self._queue.retry(works, parcel if parcel is not None and parcel.ordered else None)
        self._replace(member, reason, error)
        self._announce()

    def _replace(self, member: Member, reason: str, error: BaseException) -> None:
        served = member.born.done()
        if member.draining or len(self.names) >= self._target:
            return
        if member.optional and not served:
            self._target -= 1
            log.warning("%s", reason)
            member.born.set_exception(UserError(reason))
        elif not served and isinstance(getattr(error, "cause", None), SyncError):
            self._launch(self._replace_later(member, reason))
        else:
            self._succeed(member, reason)

    async def _replace_later(self, member: Member, reason: str) -> None:
        """A newcomer could not take the weights. Whoever published them may be gone and about to
        publish them anew: that is waited for a little, and not the worker's failure."""
        log.warning("waiting for other weights after %s", reason)
        stale = self._manifest
        try:
            async with asyncio.timeout(self._config.stall_s):
                while self._manifest is stale:
                    await self._signal.wait()
        except TimeoutError:
            self._succeed(member, reason)
            return
        if len(self.names) < self._target:
            self._enlist(born=member.born)

    def _succeed(self, member: Member, reason: str) -> None:
        """Start a successor, while the budget lasts; without, those that are left go on."""
        served = member.born.done()
        try:
            self._budget.spend(reason)
        except BudgetSpent as error:
            if not served:
                member.born.set_exception(error)
                member.born.exception()  # retrieved, whether or not somebody waits
            if not self._members:
                self._end(FleetExhausted(str(error)))
        else:
            self._enlist(born=None if served else member.born)

    def _end(self, error: BaseException) -> None:
        """Nothing can be generated any more: whoever waits hears of it."""
        self._fatal = self._fatal or error
        self._queue.fail(error)
        for member in self._members.values():
            for work in member.work.values():
                if not work.future.done():
                    work.future.set_exception(error)
        self._announce()

    # A request's way.

    def _accept(self, request: RolloutRequest) -> Work:
        if self._fatal is not None:
            raise self._fatal
        work = self._queue.accept(request)
        work.future.add_done_callback(lambda _: self._forget(work))
        return work

    def _forget(self, work: Work) -> None:
        """Stop sampling what nobody waits for any longer."""
        if work.future.cancelled() and work.holder is not None:
            errand = partial(work.holder.withdraw, [work.key])
            self._launch(self._guard(work.holder, errand))

    def _place_soon(self) -> None:
        """Once for all that happens in this turn of the event loop."""
        if not self._placing:
            self._placing = True
            asyncio.get_running_loop().call_soon(self._place)

    def _place(self) -> None:
        self._placing = False
        for member in self._queue.place(self._members.values()):
            self._launch(self._guard(member, member.send))
        self._idle.note(any(member.work for member in self._members.values()))

    def _hear(self, member: Member, answers: tuple[Answer, ...]) -> None:
        """What a worker has finished, or let go of."""
        parcel, moved = member.parcel, []
        for answer in answers:
            work = member.take(answer.key)
            if work is None or work.future.done():
                continue
            if answer.rollout is not None:
                work.future.set_result(answer.rollout)
            elif answer.taken_back is not None:
                work.take_back(answer.taken_back)
                moved.append(work)
            else:
                prompt = work.request.prompt.id
                work.future.set_exception(ValueError(f"prompt {prompt}: {answer.fault}"))
        if moved:
            ordered = parcel is not None and parcel.ordered
            self._queue.retry(moved, Parcel(moved, ordered=True) if ordered else None)
        late = member.late(self._config.deadline_s)
        for key in late:
            deadline = f"no answer in {self._config.deadline_s:g} s"
            member.work[key].losses.append(f"{member.name}: {deadline}")
        if late:
            self._launch(self._guard(member, partial(member.withdraw, late)))
        if answers:
            self._announce()

    def _announce(self) -> None:
        """Something changed: whoever waits looks again, and what is queued may find a place."""
        self._signal.set()
        self._signal = asyncio.Event()
        self._place_soon()

    def _launch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside everything else; an error that nobody expected ends the pool."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)
