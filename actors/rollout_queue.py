"""Requests that wait for a rollout worker, and which of the workers gets which."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Iterable, Sequence

from actors.rollout import RolloutRequest
from actors.rollout_member import Member, Parcel, Work
from actors.supervision import PromptLost

Entry = tuple[int, int, Member]


class RolloutQueue:
    """First come, first served: what cannot be placed yet holds up what came after it, so nothing
    waits for ever."""

    def __init__(self, most: int, attempts: int) -> None:
        """Workers get further requests while they have fewer than `most` completions in flight; a
        request is given to `attempts` workers before it is set aside."""
        self._most, self._attempts = most, attempts
        self._parcels: deque[Parcel] = deque()

    def accept(self, request: RolloutRequest) -> Work:
        """A request, still to be put in a parcel."""
        return Work(request, asyncio.Future())

    def add(self, parcel: Parcel) -> None:
        """Wait behind the others."""
        self._parcels.append(parcel)

    def retry(self, works: Sequence[Work], share: Parcel | None) -> None:
        """Queue what a worker did not finish, before all others: in place of the ordered `share`
        that it was part of, or one by one. A request whose next loss would be its last has a worker
        to itself, so that none is blamed for another; one that has no attempt left is set aside."""
        again, alone = [], []
        for work in works:
            losses = len(work.losses)
            if losses >= self._attempts:
                work.future.set_exception(PromptLost(work.request.prompt.id, work.losses))
            elif 0 < losses == self._attempts - 1:
                alone.append(work)
            else:
                again.append(work)
        parcels = [Parcel([work]) for work in again]
        if share is not None and again:
            # With what it has finished: what else it samples depends on that, too.
            parcels = [Parcel([w for w in share.works if w not in alone], ordered=True)]
        parcels += [Parcel([work], alone=True) for work in alone]
        self._parcels.extendleft(reversed(parcels))

    def place(self, members: Iterable[Member]) -> list[Member]:
        """Hand out parcels in their order, each to the least loaded worker that may have it;
        returns the workers that got some."""
        if not self._parcels:
            return []  # of thousands of workers, nobody needs to be looked at
        heap = [(m.load, m.number, m) for m in members if m.has_room(self._most)]
        heapq.heapify(heap)
        handed: dict[str, Member] = {}
        while self._parcels:
            parcel = self._parcels[0]
            if not parcel.ordered:
                parcel.works = [work for work in parcel.works if not work.future.done()]
            if parcel.open:
                member = _choose(heap, parcel)
                if member is None:
                    break
                member.hand(parcel)
                handed[member.name] = member
                if member.has_room(self._most):
                    heapq.heappush(heap, (member.load, member.number, member))
            self._parcels.popleft()
        return list(handed.values())

    def fail(self, error: BaseException) -> None:
        """Nobody will serve what waits."""
        for parcel in self._parcels:
            for work in parcel.works:
                if not work.future.done():
                    work.future.set_exception(error)
        self._parcels.clear()


def _choose(heap: list[Entry], parcel: Parcel) -> Member | None:
    """Take the least loaded worker for a parcel off the heap; one that its requests were lost or
    late with only when there is no other."""
    floor, spurned = parcel.floor, parcel.spurned
    passed: list[Entry] = []
    chosen: Member | None = None
    while heap and chosen is None:
        entry = heapq.heappop(heap)
        member = entry[2]
        if member.may_have(parcel, floor) and member.name not in spurned:
            chosen = member
        else:
            passed.append(entry)
    if chosen is None and spurned:
        again = next((e for e in passed if e[2].may_have(parcel, floor)), None)
        if again is not None:
            passed.remove(again)
            chosen = again[2]
    for entry in passed:
        heapq.heappush(heap, entry)
    return chosen


class IdleClock:
    """Seconds without a request in flight."""

    def __init__(self) -> None:
        self._busy = False
        self._since: float | None = None
        self._seconds = 0.0

    def note(self, busy: bool) -> None:
        """Whether any request is in flight now."""
        now = time.monotonic()
        if busy and self._since is not None:
            self._seconds += now - self._since
            self._since = None
        elif self._busy and not busy:
            self._since = now
        self._busy = busy

    def take(self) -> float:
        """Since it was last asked."""
        if self._since is not None:
            now = time.monotonic()
            self._seconds += now - self._since
            self._since = now
        seconds, self._seconds = self._seconds, 0.0
        return seconds
