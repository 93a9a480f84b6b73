"""Grants the user's wishes to a run that is going on, beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from actors.control import Answer, ControlDesk, Wish
from actors.journal import Journal
from actors.supervision import BudgetSpent
from raylign.config import UserError

_ASK_S = 0.5  # between two looks at the desk

Pools = Mapping[str, Callable[[int], Coroutine[Any, Any, str]]]
"""What changes the number of workers, by role; says what was done."""


async def grant_wishes(stage: Path, pools: Pools, journal: Journal) -> None:
    """Look for wishes in the directory of a stage, and grant them one by one; until cancelled."""
    desk = await asyncio.to_thread(ControlDesk, stage)
    while True:
        for wish in await asyncio.to_thread(desk.take):
            answer = await _grant(wish, pools, journal)
            await asyncio.to_thread(desk.answer, wish, answer)
        await asyncio.sleep(_ASK_S)


async def _grant(wish: Wish, pools: Pools, journal: Journal) -> Answer:
    said = []
    for role, count in wish.workers.items():
        if role not in pools:
            return Answer(False, f"this run has no {role}; it has {', '.join(pools)}")
        try:
            said.append(f"{role}: {await pools[role](count)}")
        except (UserError, BudgetSpent) as error:
            return Answer(False, str(error))
        journal.event(what="scale", role=role, count=count)
    return Answer(True, ", ".join(said))
