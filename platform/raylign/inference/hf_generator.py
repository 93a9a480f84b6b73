"""Plain transformers sampling behind the `Generator` protocol: slow, needs nothing but torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.inference.generator import Sample, Sampling
from raylign.models.loading import list_stops, load_model, load_tokenizer
from raylign.models.logprobs import score_tokens


@dataclass(slots=True)
class _Row:
    """One completion."""

    key: str
    index: int
    prompt: tuple[int, ...]
    sampling: Sampling
    """Without the seed."""
    room: int
    """Longest completion."""
    stream: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class TransformersGenerator:
    """One transformers model. A call of `advance` draws the next token of the rows being decoded,
    which are as long as each other; others wait until those are done."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        max_length: int,
        max_sequences: int,
        threads: int,
        seed: int,
    ) -> None:
        self._model = load_model(model, dtype).eval()
        self._tokenizer = load_tokenizer(model)
        self._stops = list_stops(self._model.config, self._tokenizer)
        self.max_length, self._max_sequences = max_length, max_sequences
        self._stream = torch.Generator().manual_seed(seed)
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []
        self._cache: Any = None
        self._groups: dict[str, list[Sample | None]] = {}
        self.version = 0
        torch.set_num_threads(threads)

    def submit(
        self,
        key: str,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int = 1,
        partial: Sequence[Sample] | None = None,
    ) -> None:
        if len(prompt) >= self.max_length:
            raise ValueError(
                f"prompt {key} has {len(prompt)} tokens; the context holds {self.max_length}"
            )
        if sampling.schema is not None:
            raise ValueError(f"prompt {key}: only backend=vllm holds a completion to a schema")
        begun: list[Sample | None] = list(partial) if partial else [None] * count
        room = min(sampling.max_tokens, self.max_length - len(prompt))
        self._groups[key] = [None] * count
        for index, sample in enumerate(begun):
            if sample is not None and sample.finish_reason != "abort":
                self._groups[key][index] = sample
                continue
            seed = sampling.seed_of(index, len(sample.token_ids) if sample else 0)
            stream = self._stream if seed is None else torch.Generator().manual_seed(seed)
            row = _Row(key, index, tuple(prompt), replace(sampling, seed=None), room, stream)
            if sample is not None:
                row.tokens = list(sample.token_ids)
                row.logprobs, row.versions = sample.logprobs.tolist(), sample.versions.tolist()
            self._waiting.append(row)

    def abort(self, key: str) -> list[Sample]:
        samples = self._groups.pop(key)
        for row in [*self._waiting, *self._running]:
            if row.key == key:
                samples[row.index] = self._to_sample(row, "abort")
        self._waiting = [row for row in self._waiting if row.key != key]
        self._keep([place for place, row in enumerate(self._running) if row.key != key])
        return [sample for sample in samples if sample is not None]

    @property
    def pending(self) -> int:
        return len(self._groups)

    def advance(self) -> list[tuple[str, list[Sample]]]:
        """The next token of the oldest request and of those as long, sampled alike."""
        if not self._running:
            self._gather()
        if self._running:
            self._decode()
        done = [key for key, samples in self._groups.items() if all(samples)]
        return [(key, [s for s in self._groups.pop(key) if s is not None]) for key in done]

    def _gather(self) -> None:
        rest: list[_Row] = []
        for row in self._waiting:
            first = self._running[0] if self._running else row
            alike = row.length == first.length and row.sampling == first.sampling
            fits = len(self._running) < self._max_sequences
            (self._running if alike and fits else rest).append(row)
        self._waiting, self._cache = rest, None

    @torch.no_grad()
    def _decode(self) -> None:
        new = 1 if self._cache else self._running[0].length
        fed = torch.tensor([(*row.prompt, *row.tokens)[-new:] for row in self._running])
        output = self._model(input_ids=fed, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        sampling = self._running[0].sampling
        scores = _shape_distribution(output.logits[:, -1].float(), sampling)
        drawn = self._draw(scores, sampling)
        logprobs = scores.gather(1, drawn[:, None])[:, 0].tolist()
        alive = []
        for place, (row, token) in enumerate(zip(self._running, drawn.tolist(), strict=True)):
            row.tokens.append(token)
            row.logprobs.append(logprobs[place])
            row.versions.append(self.version)
            ended = token in self._stops or token in sampling.stop
            if ended or len(row.tokens) == row.room:
                sample = self._to_sample(row, "stop" if ended else "length")
                self._groups[row.key][row.index] = sample
            else:
                alive.append(place)
        self._keep(alive)

    def _draw(self, scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """int64 [B]: a token of each row, with the noise of its own stream (the largest of
        p / exponential noise is drawn with probability p)."""
        if sampling.temperature == 0:
            return scores.argmax(-1)
        noise = torch.empty_like(scores)
        for place, row in enumerate(self._running):
            noise[place].exponential_(generator=row.stream)
        return (scores.exp() / noise).argmax(-1)

    def _keep(self, places: list[int]) -> None:
        """Go on with these rows alone."""
        if len(places) < len(self._running):
            self._running = [self._running[place] for place in places]
            if self._cache is not None and places:
                self._cache.batch_select_indices(torch.tensor(places))

    def _to_sample(self, row: _Row, finish_reason: str) -> Sample:
        return Sample(
            token_ids=tuple(row.tokens),
            logprobs=np.array(row.logprobs, np.float32),
            versions=np.array(row.versions, np.int32),
            text=self._tokenizer.decode(row.tokens, skip_special_tokens=True),
            finish_reason=finish_reason,
        )

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        scores = []
        for sequence in sequences:
            logprobs, _ = score_tokens(self._model, torch.tensor([list(sequence)]), None)
            scores.append(logprobs[0].numpy().astype(np.float32))
        return scores

    def load_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors:
                own[name].copy_(tensor)
        self.version = version
        self._cache = None  # computed by the old weights; made anew from the tokens

    def forget(self) -> None:
        """Nothing outlives a request here."""

    def close(self) -> None:
        self._waiting.clear()
        self._running.clear()
        self._groups.clear()


def _shape_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [B, V] after temperature, top-k and top-p, as tokens are drawn from."""
    if sampling.temperature == 0:
        return torch.log_softmax(logits, -1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, index = logits.sort(-1)
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))
    return torch.log_softmax(logits, -1)
