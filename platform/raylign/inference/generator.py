"""The protocol of everything that samples, and the factory of its two implementations.

A generator is a queue: `submit` prompts, `advance` it one scheduling step at a time, and collect
groups as they finish. That is the shape of continuous batching, and what lets weights change
between two steps while requests are in flight. What is in flight can be taken back at any time,
with its tokens, and go on elsewhere. `generate` is the simple way through.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from raylign.config import UserError
from raylign.models.folding import require_plain
from raylign.runtime import derive_seed


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    max_tokens: int = 96
    seed: int | None = None
    """Of this request alone; None draws from the generator's own stream."""
    stop: tuple[int, ...] = ()
    """Token ids that end a completion besides those that end the model's turn."""
    schema: str | None = None
    """JSON schema that the completion must follow, without blanks between its parts; vLLM only. One
    that was taken back starts over."""

    def seed_of(self, index: int, drawn: int) -> int | None:
        """Seed of completion `index` of the request, of which `drawn` tokens are there already:
        those that follow must not meet the noise again that the first ones were drawn with."""
        return None if self.seed is None else derive_seed(self.seed, index, drawn)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One completion."""

    token_ids: tuple[int, ...]
    """[n], the end-of-sequence token included when it was sampled."""
    logprobs: np.ndarray
    """float32 [n]: log-probability of each token under the distribution it was drawn from."""
    versions: np.ndarray
    """int32 [n]: policy version that drew each token."""
    text: str
    """Decoded without special tokens."""
    finish_reason: str
    """`stop`, `length` or `abort`; a sample that was aborted can be continued."""


def join_samples(begun: Sample, rest: Sample, text: str) -> Sample:
    """One completion from what was drawn before it was taken back, and what followed."""
    return Sample(
        token_ids=begun.token_ids + rest.token_ids,
        logprobs=np.concatenate([begun.logprobs, rest.logprobs]),
        versions=np.concatenate([begun.versions, rest.versions]),
        text=text,
        finish_reason=rest.finish_reason,
    )


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """A LoRA adapter that is to come: what an engine that serves one must know when it starts."""

    rank: int
    targets: tuple[str, ...]
    """Last parts of the names of the matrices that it adapts."""


class Generator(Protocol):
    """Samples completions and scores sequences under one set of weights at a time."""

    version: int
    """Policy version of the weights being served."""
    max_length: int
    """Tokens of context: prompt and completion together."""

    def submit(
        self,
        key: str,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int = 1,
        partial: Sequence[Sample] | None = None,
    ) -> None:
        """Queue `count` completions of `prompt`, each with a seed of its own.

        `partial` has what is there of each already: an aborted sample goes on after its last
        token, up to `max_tokens` in all; a finished one comes back as it is. Raises `ValueError`
        if the prompt is too long.
        """
        ...

    def abort(self, key: str) -> list[Sample]:
        """Take a group back, at once: what is there of each completion, finish_reason `abort`
        where it is not complete. Raises `KeyError` for a group that is not pending."""
        ...

    def advance(self) -> list[tuple[str, list[Sample]]]:
        """One scheduling step; the groups that it finished."""
        ...

    @property
    def pending(self) -> int:
        """Groups submitted and not yet returned."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """float32 [T] a sequence: log p(token t | tokens before t) at temperature 1; entry 0 is 0.

        May be called with groups in flight; those are returned by a later `advance`.
        """
        ...

    def load_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights (Hugging Face names). Groups in flight go on under the new ones:
        nothing that was computed from the old weights is reused."""
        ...

    def forget(self) -> None:
        """Drop what is cached of earlier prompts, so that what follows depends on nothing that was
        asked before. The generator must be idle."""
        ...

    def close(self) -> None:
        """Free memory and threads."""
        ...


def generate(
    generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int = 1
) -> list[list[Sample]]:
    """`count` completions of every prompt, in their order. The generator must be idle."""
    if generator.pending:
        raise RuntimeError("generate() needs an idle generator; submit() and advance() instead")
    for index, prompt in enumerate(prompts):
        generator.submit(str(index), prompt, sampling, count)
    groups: dict[str, list[Sample]] = {}
    while generator.pending:
        groups.update(generator.advance())
    return [groups[str(index)] for index in range(len(prompts))]


def build_generator(
    backend: str,
    model: Path,
    *,
    dtype: str,
    max_length: int,
    kv_cache_mb: int,
    max_sequences: int,
    threads: int,
    seed: int,
    gpu_memory_share: float | None = None,
    adapter: AdapterForm | None = None,
) -> Generator:
    """A generator serving the Hugging Face directory `model`.

    `kv_cache_mb` and `threads` are of CPUs; `gpu_memory_share` of a card, by default vLLM's own.
    With `adapter` (vLLM alone) its versions come by `load_adapter`, and the model stays.

    Raises `UserError` when vLLM is asked for and not installed, or the directory has no weights, or
    an adapter only, which vLLM does not serve here.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_length": max_length,
        "max_sequences": max_sequences,
        "threads": threads,
        "seed": seed,
    }
    if backend == "vllm":
        require_plain(model)
        from raylign.inference.vllm_generator import VLLMGenerator

        return VLLMGenerator(
            model,
            kv_cache_mb=kv_cache_mb,
            gpu_memory_share=gpu_memory_share,
            adapter=adapter,
            **options,
        )
    if backend == "transformers":
        if adapter is not None:
            raise UserError(
                "transfer.adapter_only needs rollout.backend=vllm; leave one of them out"
            )
        from raylign.inference.hf_generator import TransformersGenerator

        return TransformersGenerator(model, **options)
    raise ValueError(f"backend must be 'vllm' or 'transformers', not {backend!r}")


def fresh_keys(prefix: str) -> Iterable[str]:
    """Endless different request keys."""
    return (f"{prefix}{n}" for n in itertools.count())
