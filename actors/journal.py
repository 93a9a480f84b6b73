"""Who hears of what happens in a run: the seam between the loop and everything that shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.buffer import Group
from actors.learner import LearnerReport
from actors.weights import SyncProof
from raylign.training.batches import LearnerBatch


class Journal(Protocol):
    """Takes everything in; must neither fail nor wait."""

    def event(self, **fields: Any) -> None:
        """Something that has a beginning and an end, or just happened; see `raylign.tracking`."""
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        ...

    def rollouts(
        self,
        step: int,
        version: int,
        groups: Sequence[Group],
        batch: LearnerBatch,
        report: LearnerReport,
    ) -> None:
        """All completions of a step, learned from or not, and what the learner found of them."""
        ...

    def unlearned(self, step: int, version: int, groups: Sequence[Group], reason: str) -> None:
        """Completions that were made for a step, and of which no more comes."""
        ...

    @property
    def last_step(self) -> int:
        """The last step that all is known of, in earlier attempts too; -1 when there is none."""
        ...

    def rewind(self, step: int, undone: str = "") -> None:
        """Everything from `step` on will come again. Its completions are the same ones then, unless
        `undone` says why nothing is left of them but the record."""
        ...


def note_sync(journal: Journal) -> Callable[[str, SyncProof], None]:
    """Tells `journal` of every proved weight sync."""

    def hear(worker: str, proof: SyncProof) -> None:
        journal.event(
            actor=worker,
            what="sync",
            start=proof.start,
            end=proof.end,
            version=proof.version,
            checksum=proof.checksum,
            canary_error=proof.canary_error,
        )

    return hear


def note_change(journal: Journal) -> Callable[[str, str, str], None]:
    """Tells `journal` of workers that come and go."""

    def hear(worker: str, what: str, reason: str) -> None:
        journal.event(actor=worker, what=what, **({"text": reason} if reason else {}))

    return hear
