"""Of what was made, and is not learned from, somebody hears; what is on disk is not made again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.buffer import Group, admit
from actors.dispatch import Dispatcher
from actors.ledger import Ledger
from actors.run_files import Branch, RunFiles
from raylign.config import AlignConfig
from raylign.records import Prompt
from raylign.rewards.outcomes import Rejection, reject
from tests.actors.test_buffer import trajectory


class Source:
    """Two prompts a step."""

    def choose(self, step: int, again: int, count: int) -> list[Prompt]:
        return [Prompt(f"p{n}", (1,), "", "") for n in range(count)]

    def seed(self, request: str, attempt: int) -> int:
        return 0


class Heard:
    """What a journal is told of completions."""

    last_step = -1

    def __init__(self) -> None:
        self.unlearned_of: list[tuple[int, int, Sequence[Group], str]] = []

    def unlearned(self, *told: Any) -> None:
        self.unlearned_of.append(told)

    def event(self, **fields: Any) -> None: ...

    step = rollouts = rewind = event


def make_dispatcher(tmp_path: Path, groups: dict[str, Group]) -> tuple[Dispatcher, Heard, RunFiles]:
    """Its groups are on disk, as those of an attempt that was interrupted: nobody is asked."""
    files, heard = RunFiles(tmp_path), Heard()
    for request, group in groups.items():
        files.keep_group(int(request[0]), group)
    config = AlignConfig(steps=2, prompts_per_step=2, group_size=2, max_staleness=1)
    asked: Any = None
    found = Dispatcher(
        config, asked, asked, Source(), Ledger(), heard, files, replaces_idle_groups=False
    )
    found.begin_at(0, Branch(shift=3))
    return found, heard, files


def make_groups() -> dict[str, Group]:
    lost = Rejection("p1", "0/1", "prompt lost")
    raised = reject(trajectory("1/1", [3]), "reward raised OSError")
    return {
        "0/0": Group((trajectory("0/0", [3]), trajectory("0/0", [3])), (), "0/0"),
        "0/1": Group((trajectory("0/1", [3]),), (lost,), "0/1"),
        "1/0": Group((trajectory("1/0", [3]), trajectory("1/0", [3])), (), "1/0"),
        "1/1": Group((trajectory("1/1", [3]),), (raised,), "1/1"),
    }


def list_reasons(groups: Sequence[Group]) -> list[tuple[str, int, list[str]]]:
    return sorted(
        (group.request, len(group.trajectories), [r.reason for r in group.rejected])
        for group in groups
    )


def test_what_was_begun_and_given_up_is_told(tmp_path: Path) -> None:
    dispatcher, heard, _ = make_dispatcher(tmp_path, make_groups())

    async def scenario() -> None:
        dispatcher.allow(0)
        groups = await dispatcher.collect(0)
        admitted = admit(groups, needs_groups=True, version=3, max_staleness=1)
        dispatcher.leave_out(0, admitted.left_out)
        await dispatcher.collect(1)
        await dispatcher.cancel("rolled back")
        await dispatcher.cancel("rolled back")  # each is told once

    asyncio.run(asyncio.wait_for(scenario(), 30))
    (step, version, first, reason), (later, _, second, _) = heard.unlearned_of
    assert (step, version, reason, later) == (0, 3, "rolled back", 1)
    # Those that would have been learned from have no reason yet; others have one of their own.
    assert list_reasons(first) == [
        ("0/0", 2, []),
        ("0/1", 0, ["prompt lost", "alone in its group"]),
    ]
    assert list_reasons(second) == [("1/0", 2, []), ("1/1", 1, ["reward raised OSError"])]


def test_of_a_step_that_was_learned_nothing_is_left_to_tell(tmp_path: Path) -> None:
    dispatcher, heard, files = make_dispatcher(tmp_path, make_groups())

    async def scenario() -> None:
        dispatcher.allow(0)
        await dispatcher.collect(0)
        await dispatcher.collect(1)
        dispatcher.finish(0)
        assert files.take_group("0/0") is None and files.take_group("1/0") is not None
        await dispatcher.cancel("in flight when the run ended")

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert [(told[0], told[3]) for told in heard.unlearned_of] == [
        (1, "in flight when the run ended")
    ]
