"""Where a run goes on from, and what it leaves behind on the way: checkpoints, as a loop uses them.

Nothing random is stored and no position in the data: both are functions of seed and step.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylign.config import CheckpointConfig, UserError
from raylign.models.adapters import find_adaptation
from raylign.models.loading import DTYPES
from raylign.models.quantization import count_weights
from raylign.run import hash_json
from raylign.training.checkpoints import (
    STATE,
    DamageError,
    Event,
    clear_drafts,
    find_newest,
    require_same,
    verify,
)
from raylign.training.engine import Engine
from raylign.training.export import export_model
from raylign.training.fragments import StoredState
from raylign.training.peers import Peers
from raylign.training.room import Demand, require_room
from raylign.training.saving import Plan, Saver

_OF_THE_MODEL = ("model", "base_model", "tokenizer")

_BYTES = 4 * 3  # of a trained weight: master and two moments in float32


@dataclass(frozen=True, slots=True)
class Outline:
    """What a checkpoint belongs to, and how large it will be."""

    identity: dict[str, Any]
    trained: int
    """Weights that are trained."""
    exported: int
    """Bytes of the model, or of the adapter, that other tools load, in every checkpoint."""
    final: int
    """Bytes of all that the finished stage holds for them."""


def outline(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: dict[str, Any],
    dtype: str,
) -> Outline:
    """Of a model before an engine takes it apart. `task`: what else must be the same, by name."""
    shapes = [[n, list(p.shape), p.requires_grad] for n, p in lm.named_parameters()]
    fields = lm.config.to_dict()
    for volatile in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        fields.pop(volatile, None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    size, adaptation = DTYPES[dtype].itemsize, find_adaptation(lm)
    exported = final = trained * size
    if adaptation is not None and adaptation.foldable:
        kept = (p for n, p in lm.named_parameters() if n in adaptation.head or not p.requires_grad)
        final += sum(count_weights(p) for p in kept) * size
    identity = {
        "model": hash_json([fields, shapes]),
        "base_model": "" if adaptation is None else adaptation.fingerprint,
        "tokenizer": hash_json([vocabulary, tokenizer.chat_template, tokenizer.eos_token_id]),
        **task,
    }
    return Outline(identity, trained, exported, final)


def describe_value(value: Any) -> Any:
    """What a frozen value says, without addresses in memory, the same in every process; nothing of
    where files are, which may be moved. What has an `identity` says that in its place."""
    if isinstance(value, Path):
        return ""
    if hasattr(value, "identity"):
        return value.identity
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: describe_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Continuation:
    """Checkpoints of one rank and its peers. Every method but `take_events` is collective."""

    def __init__(
        self,
        name: str,
        root: Path,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        config: CheckpointConfig,
        form: Outline,
        *,
        dtype: str,
        saves: int,
        timeout_s: float,
        beat: Callable[[], None],
    ) -> None:
        """name: the stage, as in the user's recipe. saves: how many checkpoints the run makes in
        all. `beat` is called as long as ranks wait."""
        self._name, self._root, self._engine, self._tokenizer = name, root, engine, tokenizer
        self._config, self._outline, self._dtype, self._beat = config, form, dtype, beat
        self._peers = Peers(engine.rank, engine.world_size, engine.device)
        self._events: list[Event] = []
        self._found: tuple[Path, int, dict[str, Any]] | None = None
        size = form.trained * _BYTES + form.exported
        self.demand = Demand(size, form.final, saves, config.keep)
        plan = Plan(
            root=root,
            rank=engine.rank,
            ranks=engine.world_size,
            attempt=self._peers.share(uuid.uuid4().hex[:8]),
            identity=form.identity,
            keep=config.keep,
            asynchronous=config.asynchronous,
            timeout_s=timeout_s,
        )
        self._saver = Saver(plan, self._export)

    def find(self) -> None:
        """Look for the checkpoint to go on from. Raises `UserError` on every rank for one of
        something else, and when the disk has no room for what will be written."""
        self._found = self._peers.ask_first(self._find, self._beat)

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Go on from what was found: steps that were taken, and the progress of then; (0, {}) for
        a new run."""
        if self._found is None:
            return 0, {}
        path, step, progress = self._found
        self._engine.restore(StoredState(path / STATE))
        return step, progress

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """After `step` steps; `progress` is the first rank's. Waits for a save before this one."""
        self._peers.wait_while(lambda: self._saver.busy, self._beat)
        self._saver.save(step, self._engine.fragments(), progress)
        if not self._config.asynchronous:
            self._peers.wait_while(lambda: self._saver.writing, self._beat)

    def finish(self) -> None:
        """Wait for a save in flight."""
        self._peers.wait_while(lambda: self._saver.busy, self._beat)

    def take_events(self) -> list[Event]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events + self._saver.take_events()

    def _find(self) -> tuple[Path, int, dict[str, Any]] | None:
        self._root.mkdir(parents=True, exist_ok=True)
        clear_drafts(self._root)
        found, events = find_newest(self._root)
        self._events += events
        form, config = self._outline, self._config
        require_room(self._root, self.demand, self._name)
        if found is not None:
            path, checkpoint = found
            require_same(path, checkpoint.identity, form.identity, self._name)
            return path, checkpoint.step, checkpoint.progress
        return None if config.adopt is None else self._adopt(config.adopt)

    def _adopt(self, path: Path) -> tuple[Path, int, dict[str, Any]]:
        """A checkpoint of another run: the same model, but perhaps other settings."""
        try:
            checkpoint = verify(path)
        except DamageError as error:
            raise UserError(
                f"{self._name}.checkpoints.adopt={path}: {error}; name the directory of a "
                "checkpoint, step-NNNNNNNN"
            ) from None
        own = {what: self._outline.identity[what] for what in _OF_THE_MODEL}
        require_same(path, checkpoint.identity, own, self._name)
        return path, checkpoint.step, checkpoint.progress

    def _export(self, stored: StoredState, directory: Path) -> None:
        """The model as it was saved: a thread's work, from files, while training goes on."""
        lm = self._engine.lm
        types = {name: p.dtype for name, p in lm.named_parameters()}
        weights = {
            name: stored.whole(name).to(types.get(name, DTYPES[self._dtype]))
            for name in stored.names
        }
        export_model(lm, weights, self._tokenizer, directory)
