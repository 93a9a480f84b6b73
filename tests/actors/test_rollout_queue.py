"""Who gets which request: in order, fairly, and so that nobody is blamed for another."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from actors.rollout import RolloutRequest
from actors.rollout_member import Member, Parcel, Work
from actors.rollout_queue import IdleClock, RolloutQueue
from actors.supervision import PromptLost, Stalled
from raylign.inference.episode import Episode
from raylign.inference.generator import Sample, Sampling
from raylign.records import Prompt


@pytest.fixture(autouse=True)
def loop() -> Any:
    """Futures want one; nothing here waits."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


def make_members(count: int, version: int = 0) -> list[Member]:
    members = [Member(f"rollout-{i}", i, None, False) for i in range(count)]  # type: ignore[arg-type]
    for member in members:
        member.serving, member.version = True, version
    return members


def make_work(queue: RolloutQueue, name: str, count: int = 4, oldest: int = 0) -> Work:
    prompt = Prompt(name, (1,), "", "")
    return queue.accept(RolloutRequest(prompt, name, Sampling(), count, oldest))


def had(member: Member) -> list[str]:
    return [work.request.group for work in member.work.values()]


def test_requests_go_to_the_least_loaded_in_their_order_until_all_are_full() -> None:
    queue, members = RolloutQueue(most=8, attempts=3), make_members(2)
    for name in "abcdef":
        queue.add(Parcel([make_work(queue, name)]))
    assert queue.place(members) == members
    assert [had(m) for m in members] == [["a", "c"], ["b", "d"]]  # eight completions each
    assert queue.place(members) == []
    members[1].take(next(iter(members[1].work)))
    queue.place(members)
    assert [had(m) for m in members] == [["a", "c"], ["d", "e"]]


def test_only_who_has_proved_the_version_gets_it() -> None:
    queue, members = RolloutQueue(most=8, attempts=3), make_members(2, version=3)
    members[1].version = 4
    queue.add(Parcel([make_work(queue, "a", oldest=4)]))
    queue.add(Parcel([make_work(queue, "b", oldest=5)]))
    queue.add(Parcel([make_work(queue, "c")]))
    queue.place(members)
    assert [had(m) for m in members] == [[], ["a"]]  # c does not overtake b
    members[0].version = 5
    queue.place(members)
    assert [had(m) for m in members] == [["b", "c"], ["a"]]


def test_a_share_has_a_worker_to_itself() -> None:
    queue, members = RolloutQueue(most=8, attempts=3), make_members(2)
    share = Parcel([make_work(queue, name) for name in "abc"], ordered=True)
    queue.add(Parcel([make_work(queue, "x")]))
    queue.add(share)
    queue.add(Parcel([make_work(queue, "y")]))
    queue.place(members)
    assert [had(m) for m in members] == [["x", "y"], ["a", "b", "c"]]
    assert not members[1].has_room(1000)
    # Lost half way: all of it is made again, also what was finished.
    share.works[0].future.set_result(None)  # type: ignore[arg-type]
    rest = share.works[1:]
    for work in rest:
        work.losses.append("rollout-1: died")
    queue.retry(rest, share)
    [busy, fresh] = make_members(2)
    busy.hand(Parcel([make_work(queue, "z")]))
    queue.place([busy, fresh])
    assert [had(busy), had(fresh)] == [["z"], ["a", "b", "c"]]
    assert fresh.parcel is not None and fresh.parcel.ordered


def test_a_last_attempt_is_made_alone_and_elsewhere() -> None:
    queue, members = RolloutQueue(most=8, attempts=2), make_members(2)
    works = [make_work(queue, name) for name in "ab"]
    for work in works:
        work.losses.append("rollout-0: died")
    queue.add(Parcel([make_work(queue, "later")]))
    queue.retry(works, None)
    queue.place(members)
    # The second has no other worker left, and does not share one.
    assert [had(m) for m in members] == [["b"], ["a"]]
    works[0].losses.append("rollout-1: no token in 20 s, with 1 requests")
    queue.retry([works[0]], None)
    with pytest.raises(PromptLost, match=r"prompt a is set aside: 2 workers .*: died; rollout-1:"):
        works[0].future.result()


def sample(versions: list[int]) -> Sample:
    n = len(versions)
    return Sample((5,) * n, np.zeros(n, "f4"), np.array(versions, "i4"), "", "abort")


def test_what_was_begun_goes_on_where_it_is_not_too_new_and_starts_over_when_too_old() -> None:
    queue = RolloutQueue(most=8, attempts=3)
    work = make_work(queue, "a", count=3, oldest=2)
    work.take_back((Episode((sample([2, 3]),)), Episode((sample([1, 2]),)), Episode()))
    assert [len(episode.turns) for episode in work.begun] == [1, 0, 0]
    assert work.floor == 3
    [old, new] = make_members(2, version=2)
    new.version = 3
    queue.retry([work], None)
    queue.place([old, new])
    assert [had(old), had(new)] == [[], ["a"]]


def test_a_request_is_late_once() -> None:
    queue, [member] = RolloutQueue(most=8, attempts=3), make_members(1)
    queue.add(Parcel([make_work(queue, "a")]))
    queue.place([member])
    assert member.late(60.0) == []
    [work] = member.work.values()
    work.since -= 61
    assert member.late(60.0) == [work.key]
    assert member.late(60.0) == []
    assert member.take(work.key) is work and work.holder is None and member.load == 0


def test_what_nobody_waits_for_is_not_placed() -> None:
    queue, [member] = RolloutQueue(most=8, attempts=3), make_members(1)
    works = [make_work(queue, name) for name in "ab"]
    for work in works:
        queue.add(Parcel([work]))
    works[0].future.cancel()
    queue.place([member])
    assert had(member) == ["b"]
    queue.add(Parcel([late := make_work(queue, "c")], alone=True))
    queue.fail(RuntimeError("over"))
    with pytest.raises(RuntimeError, match="over"):
        late.future.result()


def test_idle_seconds_are_those_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("actors.rollout_queue.time.monotonic", lambda: now[0])
    clock = IdleClock()
    for at, in_flight in ((1, 2), (4, 1), (5, 0), (7, 3), (8, 0), (8.5, 1)):
        now[0] = at
        clock.note(bool(in_flight))
    assert clock.take() == 2.5 and clock.take() == 0.0
    for at, in_flight in ((9, 0), (10, None), (12, 1)):  # a stretch that goes on counts, too
        now[0] = at
        if in_flight is not None:
            clock.note(bool(in_flight))
        assert clock.take() == {9: 0.0, 10: 1.0, 12: 2.0}[at]


def test_a_request_that_a_worker_does_not_know_any_more_is_its_loss_and_named() -> None:
    queue, [member] = RolloutQueue(most=8, attempts=2), make_members(1)
    lost, fine = make_work(queue, "lost"), make_work(queue, "fine")
    for work in (lost, fine):
        queue.add(Parcel([work]))
    queue.place([member])
    fine.since += 1e6  # long before its deadline
    [key] = member.late(-1.0)
    assert member.work[key] is lost and member.late(-1.0) == []  # told once
    lost.losses.append("rollout-0: no answer in 5 s")
    told = member._late[key]
    member._find_lost(told + 4, 4, busy=False)
    member._find_lost(told + 9, 4, busy=True)  # loading weights: it gives nothing back meanwhile
    member._find_lost(told + 13, 4, busy=False)
    with pytest.raises(Stalled, match="prompt lost: neither answered nor given back within 4 s"):
        member._find_lost(told + 13.1, 4, busy=False)
    assert member.blame("rollout-0: gone") == [lost, fine]
    # It was blamed for its own deadline already: that is one loss, and not two.
    assert lost.losses == ["rollout-0: no answer in 5 s"] and fine.losses == ["rollout-0: gone"]
