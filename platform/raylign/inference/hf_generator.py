"""Plain transformers sampling behind the `Generator` protocol: slow, needs nothing but torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from raylign.inference.generator import Sample, Sampling
from raylign.models.loading import list_stops, load_model, load_tokenizer
from raylign.models.logprobs import score_tokens


class TransformersGenerator:
    """One transformers model; a call of `advance` decodes everything that is queued."""

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
        self._max_length, self._max_sequences = max_length, max_sequences
        self._stream = torch.Generator().manual_seed(seed)
        self._queue: list[tuple[str, tuple[int, ...], Sampling, int]] = []
        self.version = 0
        torch.set_num_threads(threads)

    def submit(self, key: str, prompt: Sequence[int], sampling: Sampling, count: int = 1) -> None:
        if len(prompt) >= self._max_length:
            raise ValueError(
                f"prompt {key} has {len(prompt)} tokens; the context holds {self._max_length}"
            )
        self._queue.append((key, tuple(prompt), sampling, count))

    @property
    def pending(self) -> int:
        return len(self._queue)

    def advance(self) -> list[tuple[str, list[Sample]]]:
        """Decodes the oldest request and those that share its prompt length and sampling."""
        if not self._queue:
            return []
        _, first, sampling, _ = self._queue[0]
        batch: list[tuple[str, tuple[int, ...], Sampling, int]] = []
        rest: list[tuple[str, tuple[int, ...], Sampling, int]] = []
        rows = 0
        for item in self._queue:
            alike = len(item[1]) == len(first) and item[2] == sampling
            if alike and (not batch or rows + item[3] <= self._max_sequences):
                batch.append(item)
                rows += item[3]
            else:
                rest.append(item)
        self._queue = rest
        prompts = [prompt for _, prompt, _, count in batch for _ in range(count)]
        samples = iter(self._decode(torch.tensor(prompts), sampling))
        return [(key, [next(samples) for _ in range(count)]) for key, _, _, count in batch]

    @torch.no_grad()
    def _decode(self, prompts: torch.Tensor, sampling: Sampling) -> list[Sample]:
        """Token by token with a KV cache; rows that ended go on and are cut afterwards."""
        stops = list_stops(self._model.config, self._tokenizer)
        ending = torch.tensor(stops)
        stream = self._stream
        if sampling.seed is not None:
            stream = torch.Generator().manual_seed(sampling.seed)
        cache, fed = None, prompts
        tokens, logprobs = [], []
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        for _ in range(min(sampling.max_tokens, self._max_length - prompts.shape[1])):
            output = self._model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            scores = _shape_distribution(output.logits[:, -1].float(), sampling)
            if sampling.temperature == 0:
                token = scores.argmax(-1)
            else:
                token = torch.multinomial(scores.exp(), 1, generator=stream)[:, 0]
            tokens.append(token)
            logprobs.append(scores.gather(1, token[:, None])[:, 0])
            ended |= torch.isin(token, ending)
            fed = token[:, None]
            if bool(ended.all()):
                break
        return [
            self._cut(ids, values, stops)
            for ids, values in zip(
                torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).numpy(), strict=True
            )
        ]

    def _cut(self, ids: list[int], logprobs: np.ndarray, stops: tuple[int, ...]) -> Sample:
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        length = len(ids) if end is None else end + 1
        return Sample(
            token_ids=tuple(ids[:length]),
            logprobs=logprobs[:length].astype(np.float32),
            versions=np.full(length, self.version, np.int32),
            text=self._tokenizer.decode(ids[:length], skip_special_tokens=True),
            finish_reason="length" if end is None else "stop",
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

    def close(self) -> None:
        self._queue.clear()


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
