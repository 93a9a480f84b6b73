"""Every completion that was asked for, and what became of it: at any instant

    dispatched = trained + dropped(reason) + in flight

The ledger counts completions by request (`step/number`), writes a line for each change, and refuses
to count anything twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEDGER_FILE = "ledger.jsonl"


NOTHING_SETTLED: Mapping[str, Any] = {"trained": 0, "dropped": {}}


class LedgerError(RuntimeError):
    """The books do not balance: a defect."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Completions so far."""

    dispatched: int = 0
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    in_flight: int = 0

    def check(self) -> None:
        """Raises `LedgerError` unless everything is accounted for."""
        found = self.trained + sum(self.dropped.values()) + self.in_flight
        if found != self.dispatched:
            raise LedgerError(
                f"{self.dispatched} completions were dispatched and {found} are accounted for: "
                f"{self.trained} trained, {dict(self.dropped)} dropped, {self.in_flight} in flight"
            )


class Ledger:
    """The books of one run; `file` gets a line a change, and may be thrown away."""

    def __init__(self, file: Path | None = None) -> None:
        self._open: dict[str, int] = {}
        self._dispatched = self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._stream = None if file is None else file.open("a", encoding="utf-8")

    def dispatch(self, request: str, step: int, prompt: str, completions: int) -> None:
        """Completions of a prompt are asked for. Raises `LedgerError` if the request is open."""
        if request in self._open:
            raise LedgerError(f"request {request} is already in flight")
        self._open[request] = completions
        self._dispatched += completions
        self._write(step, "dispatched", request, completions, prompt=prompt)

    def train(self, request: str, step: int, completions: int) -> None:
        """So many of a request's completions were learned from."""
        self._close(request, completions)
        self._trained += completions
        self._write(step, "trained", request, completions)

    def drop(self, request: str, step: int, reason: str, completions: int) -> None:
        """So many of a request's completions will not be learned from."""
        self._close(request, completions)
        self._dropped[reason] += completions
        self._write(step, "dropped", request, completions, reason=reason)

    def undo(self, settled: Mapping[str, Any], reason: str, step: int) -> int:
        """Go back to what was `settled` in a checkpoint: all completions booked since, trained,
        dropped or in flight, count as dropped for one reason. Returns how many such there are in
        all, those of earlier times included."""
        since = self._dispatched - settled["trained"] - sum(settled["dropped"].values())
        self._trained = settled["trained"]
        self._dropped = Counter(settled["dropped"])
        self._dropped[reason] += since
        self._open.clear()
        self._write(step, "undone", "", since, reason=reason)
        return self._dropped[reason]

    @property
    def totals(self) -> Totals:
        """What is booked now; it has been checked."""
        totals = Totals(
            self._dispatched, self._trained, dict(self._dropped), sum(self._open.values())
        )
        totals.check()
        return totals

    def settled(self) -> dict[str, Any]:
        """What goes into a checkpoint: completions whose fate is sealed. Those in flight are asked
        for again by whoever goes on from it."""
        return {
            "trained": self._trained,
            "dropped": dict(self._dropped),
        }

    def restore(self, settled: Mapping[str, Any]) -> None:
        """Go on after `settled`; nothing may have been booked yet."""
        if self._dispatched:
            raise LedgerError("a ledger that is in use cannot be restored")
        self._trained = int(settled["trained"])
        self._dropped = Counter(settled["dropped"])
        self._dispatched = self._trained + sum(self._dropped.values())

    def close(self) -> None:
        """Write no more."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _close(self, request: str, completions: int) -> None:
        left = self._open.get(request, 0) - completions
        if completions < 1 or left < 0:
            raise LedgerError(
                f"request {request} has {self._open.get(request, 0)} completions in flight, "
                f"not {completions}"
            )
        if left:
            self._open[request] = left
        else:
            self._open.pop(request)

    def _write(self, step: int, what: str, request: str, completions: int, **more: str) -> None:
        if self._stream is not None:
            line = {"step": step, "what": what, "request": request, "completions": completions}
            self._stream.write(json.dumps(line | more) + "\n")
            self._stream.flush()
