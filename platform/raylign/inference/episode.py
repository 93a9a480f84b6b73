"""A completion of one turn or of several, complete or on its way.

What the policy said and what answered it stand in one token sequence, turn after turn. Sampled ids
are never tokenised again, and an episode that is taken from one generator goes on in another from
what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raylign.inference.generator import Sample


@dataclass(frozen=True, slots=True)
class Reply:
    """What is said to a turn of the policy."""

    tokens: tuple[int, ...] | None
    """To append before the next turn; None ends the episode."""
    reward: float | None = None
    cut: bool = False
    """Whether the end is a limit's, and not the policy's or the environment's."""
    failure: str = ""
    """Why there can be no answer; ends the episode, which nothing can be learned from."""
    detail: str = ""
    """What the error said."""


class Responder(Protocol):
    """Answers the turns of one episode, in their order."""

    def reply(self, turn: Sample) -> Reply:
        """Hear a complete turn. Asked again from the first turn on, with the same texts, it gives
        the same answers: so an episode can be taken up elsewhere."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One completion."""

    turns: tuple[Sample, ...] = ()
    """What the policy said; the last one may be aborted, and can then be continued."""
    replies: tuple[Reply, ...] = ()
    """To each turn, but to one that is aborted or whose answer is awaited."""

    @property
    def failure(self) -> Reply | None:
        """The reply that could not be given."""
        return self.replies[-1] if self.replies and self.replies[-1].failure else None

    @property
    def finish_reason(self) -> str:
        """`stop`, `length` (of a turn, of the context, or of the number of turns) or `abort`."""
        if not self.turns:
            return "abort"
        if self.replies and self.replies[-1].cut:
            return "length"
        return self.turns[-1].finish_reason

    @property
    def reward(self) -> float | None:
        """Sum of what the environment gave. If it gave nothing, 0 where a limit ended the episode,
        which is the policy's own doing, and else None."""
        given = [reply.reward for reply in self.replies if reply.reward is not None]
        if not given and self.replies and self.replies[-1].cut:
            return 0.0
        return sum(given) if given else None

    @property
    def versions(self) -> tuple[int, int] | None:
        """Oldest and newest policy version among the sampled tokens; None without any."""
        spans = [turn.versions for turn in self.turns if len(turn.versions)]
        if not spans:
            return None
        return int(min(s.min() for s in spans)), int(max(s.max() for s in spans))

    def listing(self) -> list[int]:
        """All tokens after the prompt."""
        tokens: list[int] = []
        for place, turn in enumerate(self.turns):
            tokens += turn.token_ids
            if place < len(self.replies):
                tokens += self.replies[place].tokens or ()
        return tokens
