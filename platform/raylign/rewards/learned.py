"""Reward models as a source: the score that a transformer with a scalar head gives a completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.models.heads import is_scorer, load_scorer, score_states
from raylign.models.loading import load_config, load_tokenizer, pad_id
from raylign.records import Prompt, Trajectory, split_by_tokens
from raylign.rewards.outcomes import Measured, read_batch, reject

_TOKENS_AT_ONCE = 16_384


class RewardModel:
    """A model for sequence classification with one label, from a stage or any directory.

    Where the policy's tokenizer is the same as the model's, the tokens that the policy read and
    sampled are scored; otherwise the prompt and the completion go as text through the model's own
    chat template. The score stands, as transformers has it, at the last token that is not padding.
    """

    def __init__(self, path: Path, policy: Path | None = None, place: str = "align.reward") -> None:
        """`policy`: directory of the model whose completions are scored. Raises `UserError` when
        `path` holds no such model, or has another tokenizer and no chat template."""
        directory = check_reward_model(path, place)
        scorer: Any = load_scorer(directory)
        self._tokenizer = load_tokenizer(directory)
        self._same = policy is not None and have_same_tokenizer(directory, policy)
        if not self._same:
            _require_template(self._tokenizer, path, place)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = scorer.eval().to(self._device)
        self._pad = pad_id(self._tokenizer)
        self._context = int(getattr(scorer.config, "max_position_embeddings", 1 << 30))

    def measure(self, trajectories: Sequence[Trajectory], prompt: Prompt) -> list[Measured]:
        """The part `score` of each; one too long for the model's context is rejected."""
        rows = [self._encode(trajectory, prompt) for trajectory in trajectories]
        fitting = [i for i, row in enumerate(rows) if 0 < len(row) <= self._context]
        scores = self._score([rows[i] for i in fitting])
        by_row = dict(zip(fitting, scores, strict=True))
        values = [
            by_row.get(i, reject(t, "longer than the reward model's context"))
            for i, t in enumerate(trajectories)
        ]
        return read_batch(trajectories, values)

    def _encode(self, trajectory: Trajectory, prompt: Prompt) -> list[int]:
        if self._same:
            tokens = [int(token) for token in trajectory.token_ids]
        else:
            said = [
                {"role": "user", "content": prompt.text},
                {"role": "assistant", "content": trajectory.text},
            ]
            tokens = list(self._tokenizer.apply_chat_template(said, return_dict=False))
        while len(tokens) > 1 and tokens[-1] == self._pad:
            tokens.pop()
        return tokens

    @torch.no_grad()
    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores [n] of token rows, computed longest first and given back in order."""
        scores = [0.0] * len(rows)
        for part in split_by_tokens([len(row) for row in rows], _TOKENS_AT_ONCE):
            width = max(len(rows[i]) for i in part)
            tokens = torch.full((len(part), width), self._pad)
            mask = torch.zeros(len(part), width, dtype=torch.int64)
            for line, i in enumerate(part):
                tokens[line, : len(rows[i])] = torch.tensor(rows[i])
                mask[line, : len(rows[i])] = 1
            hidden = self._model.base_model(
                input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)
            ).last_hidden_state
            ends = torch.tensor([len(rows[i]) - 1 for i in part], device=self._device)
            states = hidden[torch.arange(len(part), device=self._device), ends]
            for i, score in zip(part, score_states(self._model, states).tolist(), strict=True):
                scores[i] = score
        return scores


def check_reward_model(path: Path, place: str, policy: Path | None = None) -> Path:
    """Where in `path` the model is. Raises `UserError`, without loading weights, when it is none
    with one score an answer or, where `policy` is given, cannot read what that samples."""
    directory = path / "model" if (path / "model").is_dir() else path
    if is_scorer(directory, "steps"):
        raise UserError(
            f"{place}.model={path} scores the steps of an answer; give a model that scores whole "
            "answers (reward_model.kind=pairs or outcome)"
        )
    if not is_scorer(directory, "score"):
        raise UserError(
            f"{place}.model={path} is no reward model; train one with `python -m jobs.reward_model`"
        )
    labels = load_config(directory).num_labels
    if labels != 1:
        raise UserError(f"{place}.model={path} has {labels} labels; a reward model has one")
    if policy is not None and not have_same_tokenizer(directory, policy):
        _require_template(load_tokenizer(directory), path, place)
    return directory


def _require_template(tokenizer: PreTrainedTokenizerBase, path: Path, place: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{place}.model={path} has another tokenizer than the policy and no chat template, so "
            "it cannot read its conversations; add chat_template.jinja to it"
        )


def have_same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both directories turn texts into the same tokens, by their `tokenizer.json`."""
    return (found := _read_tokenizer(one)) is not None and found == _read_tokenizer(other)


def _read_tokenizer(directory: Path) -> dict[str, Any] | None:
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # What the last call padded or cut to is saved along, and says nothing about tokens.
    return {name: value for name, value in fields.items() if name not in ("padding", "truncation")}
