"""The protocol of an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raylign.records import Prompt


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an environment makes of a turn."""

    observation: str = ""
    """Shown to the policy before its next turn; of no account when the episode is over."""
    reward: float | None = None
    """Of this turn; an episode's are summed. None where there is nothing to say; an episode that a
    limit cut off before anything was said is worth 0."""
    done: bool = False
    """Whether the episode is over."""


class Environment(Protocol):
    """One episode at a time, each with an environment of its own.

    It answers the same turns with the same observations: an episode that moves to another worker
    is taken up by `reset` and the turns so far, and starts over if an answer differs. When it
    raises, or is not heard of in time, that says nothing about the policy: the episode is set
    aside, and counted. Its calls come one after the other, from different threads.
    """

    def reset(self, prompt: Prompt) -> None:
        """Begin an episode."""
        ...

    def step(self, completion: str) -> Outcome:
        """Hear a turn of the policy, without special tokens."""
        ...
