"""vLLM behind the `Generator` protocol: the only file that imports vllm.

The engine core runs in this process and is stepped by hand. That makes weight updates between two
steps exact, lets nothing outlive this process, and starts in seconds on a CPU. Two facts of vLLM
are handled here: CPU layers keep a repacked copy of their weights, so updates go through its
layer-wise reload (which forgets a tied output head); and every cached key and value was computed
by the old weights, so all of them are dropped at each update.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.config import UserError
from raylign.inference.generator import Sample, Sampling, fresh_keys

_ANSWERS_TO_ANYTHING = "llvmlite.binding.ffi"


class VLLMGenerator:
    """One in-process vLLM engine."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        max_length: int,
        kv_cache_mb: int,
        max_sequences: int,
        threads: int,
        seed: int,
    ) -> None:
        # vLLM reads these when the engine is built.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            from vllm import EngineArgs, SamplingParams
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise UserError(
                f"backend=vllm needs vLLM, which cannot be imported ({error}); install "
                "raylign[cpu] or raylign[gpu], or choose backend=transformers"
            ) from None
        if not (model / "config.json").is_file():
            raise UserError(f"{model} is no model directory: it has no config.json")
        self._sampling_params, self._final = SamplingParams, RequestOutputKind.FINAL_ONLY
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            _check_head_size(model)
        settings = EngineArgs(
            model=str(model),
            dtype=dtype,
            seed=seed % 2**31,
            max_model_len=max_length,
            max_num_seqs=max_sequences,
            # Compilation takes longer than a small model's whole run and gains little there.
            enforce_eager=not on_gpu,
            kv_cache_memory_bytes=None if on_gpu else kv_cache_mb << 20,
            # A prompt that is read in pieces turns its generator back after each, which generators
            # of CPU tensors cannot (vLLM 0.32): there every prompt is read at once.
            enable_chunked_prefill=None if on_gpu else False,
            max_num_batched_tokens=None if on_gpu else max(2048, max_length),
            enable_prefix_caching=True,
            # The distribution that tokens are drawn from, temperature and top-k/p included.
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
        )
        with _llvmlite_out_of_sight():
            self._engine: Any = LLMEngine.from_engine_args(settings)
        if not on_gpu:
            torch.set_num_threads(threads)
        self._tokenizer = self._engine.get_tokenizer()
        self._max_length = max_length
        self._groups: dict[str, str] = {}
        self._scores: dict[str, np.ndarray | None] = {}
        self._finished: list[tuple[str, list[Sample]]] = []
        self._keys = iter(fresh_keys("r"))
        self._serve(0)

    def submit(self, key: str, prompt: Sequence[int], sampling: Sampling, count: int = 1) -> None:
        if len(prompt) >= self._max_length:
            raise ValueError(
                f"prompt {key} has {len(prompt)} tokens; the context holds {self._max_length}"
            )
        params = self._sampling_params(
            n=count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_tokens, self._max_length - len(prompt)),
            seed=sampling.seed,
            logprobs=0,  # the sampled token's own, and no alternatives
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final,
        )
        request = next(self._keys)
        self._engine.add_request(request, {"prompt_token_ids": list(prompt)}, params)
        self._groups[request] = key

    def advance(self) -> list[tuple[str, list[Sample]]]:
        if self._engine.has_unfinished_requests():
            self._step()
        finished, self._finished = self._finished, []
        return finished

    @property
    def pending(self) -> int:
        return len(self._groups) + len(self._finished)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        params = self._sampling_params(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=self._final
        )
        requests = []
        for sequence in sequences:
            if len(sequence) >= self._max_length:
                raise ValueError(
                    f"cannot score {len(sequence)} tokens; the context holds {self._max_length - 1}"
                )
            request = next(self._keys)
            self._scores[request] = None
            self._engine.add_request(request, {"prompt_token_ids": list(sequence)}, params)
            requests.append(request)
        while any(self._scores[request] is None for request in requests):
            self._step()
        return [self._scores.pop(request) for request in requests]  # type: ignore[misc]

    def load_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        _repack_tied_heads(self._model())
        # Requests in flight are put back and recompute their prefix under the new weights.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._serve(version)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _serve(self, version: int) -> None:
        self.version = version
        self._engine.set_weight_version(str(version))

    def _model(self) -> torch.nn.Module:
        core = self._engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.get_model()

    def _step(self) -> None:
        for output in self._engine.step():
            if not output.finished:
                continue
            if output.request_id in self._scores:
                self._scores[output.request_id] = _prompt_scores(output)
            else:
                samples = [
                    self._to_sample(c) for c in sorted(output.outputs, key=lambda c: c.index)
                ]
                self._finished.append((self._groups.pop(output.request_id), samples))

    def _to_sample(self, completion: Any) -> Sample:
        tokens = tuple(completion.token_ids)
        versions = np.full(len(tokens), self.version, np.int32)
        spans = completion.weight_versions or []
        for span in spans:
            versions[span.start : span.end] = int(span.version)
        return Sample(
            token_ids=tokens,
            logprobs=np.array(completion.logprobs.logprobs, np.float32),
            versions=versions,
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
            finish_reason=completion.finish_reason or "abort",
        )


@contextmanager
def _llvmlite_out_of_sight() -> Iterator[None]:
    """vLLM on a CPU looks through the attributes of every loaded module. One object of llvmlite,
    which numba brings, answers to any attribute name at all, `__dict__` too, and stops it."""
    hidden = sys.modules.pop(_ANSWERS_TO_ANYTHING, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[_ANSWERS_TO_ANYTHING] = hidden


def _check_head_size(model: Path) -> None:
    """vLLM on a CPU knows attention heads of certain widths, and says so only when it generates."""
    from transformers import AutoConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    shape = AutoConfig.from_pretrained(model, local_files_only=True)
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if width not in known:
        raise UserError(
            f"{model} has attention heads of {width} dimensions (hidden_size / heads), and vLLM on "
            f"a CPU knows {', '.join(map(str, known))}; choose another shape, or "
            "backend=transformers"
        )


def _prompt_scores(output: Any) -> np.ndarray:
    """float32 [T] from vLLM's prompt log-probabilities, whose first entry is None."""
    scores = np.zeros(len(output.prompt_token_ids), np.float32)
    for index, token in enumerate(output.prompt_token_ids):
        entry = output.prompt_logprobs[index]
        if entry is not None:
            scores[index] = entry[token].logprob
    return scores


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Redo the CPU packing of output heads that share an embedding's weight.

    The layer-wise reload processes a shared tensor once, for the embedding, and leaves the head
    with the packed copy of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        head = getattr(module, "base_layer", module)
        if isinstance(head, ParallelLMHead) and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)
