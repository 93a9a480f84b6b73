"""What a learner goes on from: policy and critic, their optimizers and the version, in checkpoints
of the same kind as every training stage's."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylign.config import CheckpointConfig, UserError
from raylign.models.loading import DTYPES
from raylign.run import hash_json
from raylign.training.checkpoints import STATE, Checkpoint, DamageError, Event, require_same, verify
from raylign.training.continuation import outline
from raylign.training.engine import Engine
from raylign.training.export import export_model
from raylign.training.fragments import Fragment, StoredState
from raylign.training.peers import Peers
from raylign.training.policy import PolicyLearner
from raylign.training.saving import Plan, Saver

POLICY, CRITIC = "policy", "critic"


class StoredPart(StoredState):
    """What was stored of one of several models, by its own names."""

    def __init__(self, directory: Path, part: str) -> None:
        """Raises `UserError` when `directory` holds nothing of it."""
        super().__init__(directory)
        head = f"{part}."
        self._pieces = {
            name.removeprefix(head): pieces
            for name, pieces in self._pieces.items()
            if name.startswith(head)
        }
        if not self._pieces:
            raise UserError(f"{directory} holds no state of a {part}")


@dataclass(frozen=True, slots=True)
class StatePlan:
    """How a learner's state is kept."""

    identity: dict[str, Any]
    """What a checkpoint must be of; see `identify`."""
    checkpoints: CheckpointConfig
    dtype: str
    timeout_s: float
    """Longest time in which no rank writes anything before a save is given up."""


def identify(
    policy: PreTrainedModel,
    critic: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
) -> dict[str, Any]:
    """What a learner's state belongs to, of models that no engine has taken apart yet."""
    shapes = None
    if critic is not None:
        shapes = hash_json([[n, list(p.shape)] for n, p in critic.named_parameters()])
    return outline(policy, tokenizer, {"critic": shapes}, dtype).identity


class LearnerState:
    """Saves and restores one rank's part. Every method is collective but `take_events`."""

    def __init__(
        self, learner: PolicyLearner, tokenizer: PreTrainedTokenizerBase, plan: StatePlan
    ) -> None:
        self._learner, self._tokenizer, self._plan = learner, tokenizer, plan
        engine = learner.engine
        self._peers = Peers(engine.rank, engine.world_size, engine.device)
        self._root: Path | None = None
        self._saver: Saver | None = None
        self._events: list[Event] = []

    def save(self, root: Path, progress: dict[str, Any]) -> None:
        """A checkpoint `step-VERSION` in `root`, with the first rank's `progress`, JSON. When that
        is asynchronous it goes on beside the next update; a save before this one is waited for."""
        self.finish()
        saver = self._open(root)
        saver.save(self._learner.version, self._list_fragments(), progress)
        if not self._plan.checkpoints.asynchronous:
            self._peers.wait_while(lambda: saver.writing)

    def finish(self) -> None:
        """Wait for a save in flight."""
        if self._saver is not None:
            saver = self._saver
            self._peers.wait_while(lambda: saver.busy)

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from the checkpoint in directory `path`; its progress.

        Raises `UserError` on every rank when it is damaged, or of another model.
        """
        checkpoint = self._peers.ask_first(lambda: self._verify(path))
        learner = self._learner
        learner.engine.restore(StoredPart(path / STATE, POLICY))
        if learner.critic is not None:
            learner.critic.engine.restore(StoredPart(path / STATE, CRITIC))
        learner.restore(checkpoint.step)
        return checkpoint.progress

    def take_events(self) -> list[Event]:
        """What became of saves since the last call."""
        if self._saver is not None:
            self._events += self._saver.take_events()
        events, self._events = self._events, []
        return events

    def _verify(self, path: Path) -> Checkpoint:
        try:
            checkpoint = verify(path)
        except DamageError as error:
            raise UserError(
                f"checkpoint {path}: {error}; remove it, and the run goes on from the one before"
            ) from None
        require_same(path, checkpoint.identity, self._plan.identity, "align")
        return checkpoint

    def _open(self, root: Path) -> Saver:
        if self._saver is not None and self._root == root:
            return self._saver
        if self._saver is not None:
            self._events += self._saver.take_events()
        root.mkdir(parents=True, exist_ok=True)
        engine, config = self._learner.engine, self._plan.checkpoints
        plan = Plan(
            root=root,
            rank=engine.rank,
            ranks=engine.world_size,
            attempt=self._peers.share(uuid.uuid4().hex[:8]),
            identity=self._plan.identity,
            keep=config.keep,
            asynchronous=config.asynchronous,
            timeout_s=self._plan.timeout_s,
        )
        self._root, self._saver = root, Saver(plan, self._export)
        return self._saver

    def _list_fragments(self) -> list[Fragment]:
        learner = self._learner
        found = _rename(learner.engine, POLICY)
        return (
            found if learner.critic is None else [*found, *_rename(learner.critic.engine, CRITIC)]
        )

    def _export(self, stored: StoredState, directory: Path) -> None:
        """The policy as it was saved, or its adapter: a thread's work, while training goes on."""
        lm = self._learner.engine.lm
        types = {name: p.dtype for name, p in lm.named_parameters()}
        weights = {
            name: stored.whole(f"{POLICY}.{name}").to(types.get(name, DTYPES[self._plan.dtype]))
            for name in _names_of(stored, POLICY)
        }
        export_model(lm, weights, self._tokenizer, directory)


def _rename(engine: Engine, part: str) -> list[Fragment]:
    return [dataclasses.replace(f, name=f"{part}.{f.name}") for f in engine.fragments()]


def _names_of(stored: StoredState, part: str) -> Sequence[str]:
    head = f"{part}."
    return [name.removeprefix(head) for name in stored.names if name.startswith(head)]
