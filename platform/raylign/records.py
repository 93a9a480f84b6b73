"""The nouns that cross processes.

Position convention, said once: in every per-token array, index t belongs to token t itself, so
`logprobs[t]` is the log-probability *of* token t given the tokens before it, and index 0 (which
nothing predicts) is never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # where prompts and trajectories go, such as to rewards, nobody waits for it
    import torch


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question ready to be sampled from."""

    id: str
    token_ids: tuple[int, ...]
    text: str
    """What the user sees, before the chat template."""
    reference: str
    """The right answer, for the verifier."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id} has no tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled sequence with everything that learning needs; arrays have one length T.

    Multi-turn text and tool output are spans with `loss_mask` False of the same sequence: what the
    model sampled is never tokenised again.
    """

    prompt_id: str
    group_id: str
    """Completions of one prompt in one step share it."""
    token_ids: np.ndarray
    """int32 [T]: prompt, then completion."""
    loss_mask: np.ndarray
    """bool [T]: True where the policy sampled the token."""
    logprobs: np.ndarray
    """float32 [T]: behaviour log-probability of each sampled token, 0 elsewhere."""
    versions: np.ndarray
    """int32 [T]: policy version that sampled the token, -1 elsewhere."""
    finish_reason: str
    """`stop` (end of turn), `length` (cut off) or `abort`."""
    text: str
    """The decoded completion."""
    reward: float | None = None
    """Total reward, once scored."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Named parts of the total."""
    worker: str = ""
    """Who sampled it; of several, who ended it."""
    turns: int = 1
    """Times that the policy spoke."""
    environment_reward: float | None = None
    """What its environment gave for it, where there was one."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name in ("loss_mask", "logprobs", "versions"):
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"trajectory of prompt {self.prompt_id}: {name} has "
                    f"{len(getattr(self, name))} entries for {length} tokens"
                )
        if length and self.loss_mask[0]:
            raise ValueError(f"trajectory of prompt {self.prompt_id}: token 0 cannot be trained")

    @property
    def version_span(self) -> tuple[int, int]:
        """Lowest and highest policy version among the sampled tokens; (-1, -1) if none."""
        sampled = self.versions[self.loss_mask]
        return (int(sampled.min()), int(sampled.max())) if len(sampled) else (-1, -1)

    @property
    def sampled_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def scored(self, reward: float, parts: dict[str, float]) -> Trajectory:
        """A copy with its reward."""
        return replace(self, reward=reward, reward_parts=parts)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Right-padded tensors of B sequences of at most T tokens."""

    tokens: torch.Tensor
    """int64 [B, T]"""
    lengths: torch.Tensor
    """int64 [B]: real tokens of each row."""
    loss_mask: torch.Tensor
    """bool [B, T]"""
    behaviour_logprobs: torch.Tensor
    """float32 [B, T]"""
    versions: torch.Tensor
    """int32 [B, T]"""
    advantages: torch.Tensor
    """float32 [B, T]"""
    weights: torch.Tensor
    """float32 [B, T]: each token's share of the loss, 0 where it is not trained. Shares are set for
    the whole step before it is split over ranks and micro-batches: any split sums to the same."""
    rewards: torch.Tensor
    """float32 [B, T]: each trajectory's total on its last sampled token, 0 elsewhere."""
    old_logprobs: torch.Tensor | None = None
    """float32 [B, T], like all that follow filled by the learner: its own policy before the first
    optimizer step on this batch."""
    reference_logprobs: torch.Tensor | None = None
    """float32 [B, T]"""
    values: torch.Tensor | None = None
    """float32 [B, T]: what the critic expected when token t was chosen, before its first step."""
    returns: torch.Tensor | None = None
    """float32 [B, T]: what the critic should have expected."""

    @property
    def rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Sequence[int]) -> Batch:
        """The given rows, cut to their own longest sequence."""
        import torch

        index = torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device)
        width = int(self.lengths[index].max()) if len(rows) else 1
        return self._map(
            lambda tensor: tensor[index][:, :width] if tensor.ndim > 1 else tensor[index]
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """`function` of every tensor that is there."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        made: dict[str, Any] = {n: None if t is None else function(t) for n, t in found.items()}
        return Batch(**made)


def collate(
    trajectories: Sequence[Trajectory],
    advantages: Iterable[float | np.ndarray],
    weights: Iterable[float | np.ndarray],
    pad_id: int,
) -> Batch:
    """Trajectories as one `Batch`; advantage and loss weight of each are a number or an array [T].

    Raises `ValueError` for an empty list, or lists of different lengths.
    """
    import torch

    if not trajectories:
        raise ValueError("cannot collate an empty list of trajectories")
    rows, width = len(trajectories), max(len(t.token_ids) for t in trajectories)
    tokens = np.full((rows, width), pad_id, np.int64)
    mask = np.zeros((rows, width), bool)
    logprobs = np.zeros((rows, width), np.float32)
    versions = np.full((rows, width), -1, np.int32)
    gains = np.zeros((rows, width), np.float32)
    shares = np.zeros((rows, width), np.float32)
    rewards = np.zeros((rows, width), np.float32)
    each = enumerate(zip(trajectories, advantages, weights, strict=True))
    for row, (trajectory, advantage, weight) in each:
        n = len(trajectory.token_ids)
        tokens[row, :n] = trajectory.token_ids
        mask[row, :n] = trajectory.loss_mask
        logprobs[row, :n] = trajectory.logprobs
        versions[row, :n] = trajectory.versions
        gains[row, :n] = np.where(trajectory.loss_mask, advantage, 0.0)
        shares[row, :n] = np.where(trajectory.loss_mask, weight, 0.0)
        if trajectory.reward is not None and trajectory.sampled_tokens:
            rewards[row, np.flatnonzero(trajectory.loss_mask)[-1]] = trajectory.reward
    return Batch(
        tokens=torch.from_numpy(tokens),
        lengths=torch.tensor([len(t.token_ids) for t in trajectories]),
        loss_mask=torch.from_numpy(mask),
        behaviour_logprobs=torch.from_numpy(logprobs),
        versions=torch.from_numpy(versions),
        advantages=torch.from_numpy(gains),
        weights=torch.from_numpy(shares),
        rewards=torch.from_numpy(rewards),
    )


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows grouped so that rows x longest <= `budget`, longest first; a single longer row stands
    alone. Every row appears exactly once."""
    groups: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * width <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            width = lengths[row]
    return groups
