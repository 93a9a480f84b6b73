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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.config import UserError
from raylign.inference.generator import AdapterForm, Sample, Sampling, fresh_keys, join_samples
from raylign.inference.vllm_weights import place_adapter, plan_weights

_ANSWERS_TO_ANYTHING = "llvmlite.binding.ffi"
_ADAPTER = 1  # its number in vLLM
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(slots=True)
class _Group:
    """A request's completions."""

    samples: list[Sample | None]
    """Those that are complete."""
    begun: list[Sample | None]
    """What was there of each when it was submitted."""
    requests: dict[str, tuple[int, str]]
    """Of vLLM, one a completion that is not complete: its place, and vLLM's own name for it."""


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
        gpu_memory_share: float | None = None,
        adapter: AdapterForm | None = None,
    ) -> None:
        _set_environment()
        try:
            from vllm import EngineArgs, SamplingParams
            from vllm.exceptions import VLLMClientError
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.v1.engine import FinishReason
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise UserError(
                f"backend=vllm needs vLLM, which cannot be imported ({error}); install "
                "raylign[cpu] or raylign[gpu], or choose backend=transformers"
            ) from None
        if not (model / "config.json").is_file():
            raise UserError(f"{model} is no model directory: it has no config.json")
        self._sampling_params, self._final = SamplingParams, RequestOutputKind.FINAL_ONLY
        self._structure, self._refusal = StructuredOutputsParams, VLLMClientError
        self._aborted = FinishReason.ABORT
        if not (on_gpu := torch.cuda.is_available()):
            _check_head_size(model)
        settings = EngineArgs(
            model=str(model),
            dtype=dtype,
            seed=seed % 2**31,
            max_model_len=max_length,
            max_num_seqs=max_sequences,
            enable_prefix_caching=True,
            # The distribution that tokens are drawn from, temperature and top-k/p included.
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            # Else a weak model may fill a whole completion with blanks and still follow its schema.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            **_device_options(on_gpu, max_length, kv_cache_mb, gpu_memory_share),
            **_adapter_options(adapter),
        )
        self._adapter: Any = None
        with _llvmlite_out_of_sight():
            self._engine: Any = LLMEngine.from_engine_args(settings)
        if not on_gpu:
            torch.set_num_threads(threads)
        self._plan = None if on_gpu else plan_weights(self._model())
        self._tokenizer = self._engine.get_tokenizer()
        self.max_length = max_length
        self._groups: dict[str, _Group] = {}
        self._owners: dict[str, str] = {}  # the group of a request
        self._scores: dict[str, np.ndarray | None] = {}
        self._finished, self._keys = list[tuple[str, list[Sample]]](), iter(fresh_keys("r"))
        self._serve(0)

    def submit(
        self,
        key: str,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int = 1,
        partial: Sequence[Sample] | None = None,
    ) -> None:
        try:
            self._submit(key, prompt, sampling, count, partial)
        except self._refusal as error:  # such as a temperature that vLLM does not know
            raise ValueError(f"prompt {key}: {error}") from None

    def _submit(
        self,
        key: str,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int,
        partial: Sequence[Sample] | None,
    ) -> None:
        if len(prompt) >= self.max_length:
            raise ValueError(
                f"prompt {key} has {len(prompt)} tokens; the context holds {self.max_length}"
            )
        # vLLM could make several completions of one request, but gives them neighbouring seeds.
        begun: list[Sample | None] = list(partial) if partial else [None] * count
        if sampling.schema is not None:  # a schema is followed from its beginning
            begun = [None if s and s.finish_reason == "abort" else s for s in begun]
        group = _Group([None] * count, begun, {})
        for index, sample in enumerate(begun):
            if sample is not None and sample.finish_reason != "abort":
                group.samples[index] = sample
                continue
            drawn = sample.token_ids if sample else ()
            room = min(sampling.max_tokens, self.max_length - len(prompt)) - len(drawn)
            params = self._sampling_params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=room,
                seed=sampling.seed_of(index, len(drawn)),
                stop_token_ids=list(sampling.stop) or None,
                logprobs=0,  # the sampled token's own, and no alternatives
                flat_logprobs=True,
                detokenize=False,
                output_kind=self._final,
                structured_outputs=self._structure(json=sampling.schema)
                if sampling.schema is not None
                else None,
            )
            request = next(self._keys)
            inside = self._engine.add_request(
                request,
                {"prompt_token_ids": [*prompt, *drawn]},
                params,
                lora_request=self._adapter,
            )
            group.requests[request] = (index, inside)
            self._owners[request] = key
        self._groups[key] = group
        self._deliver(key)

    def abort(self, key: str) -> list[Sample]:
        for place, (done, samples) in enumerate(self._finished):
            if done == key:
                del self._finished[place]
                return samples
        group = self._groups.pop(key)
        states = self._engine.output_processor.request_states
        for request, (index, inside) in group.requests.items():
            output = states[inside].make_request_output([], None, self._aborted, None)
            group.samples[index] = self._to_sample(output.outputs[0], group.begun[index])
            del self._owners[request]
        self._engine.abort_request([inside for _, inside in group.requests.values()], internal=True)
        return [sample for sample in group.samples if sample is not None]

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
            if len(sequence) >= self.max_length:
                raise ValueError(
                    f"cannot score {len(sequence)} tokens; the context holds {self.max_length - 1}"
                )
            request = next(self._keys)
            self._scores[request] = None
            self._engine.add_request(
                request,
                {"prompt_token_ids": list(sequence)},
                params,
                lora_request=self._adapter,
            )
            requests.append(request)
        while any(self._scores[request] is None for request in requests):
            self._step()
        return [self._scores.pop(request) for request in requests]  # type: ignore[misc]

    def load_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._plan is not None:
            self._plan.load(tensors)
        else:
            reload = {"weights_iterator": iter(tensors)}
            self._engine.collective_rpc("reload_weights", kwargs=reload)
            _repack_tied_heads(self._model())
        # Requests in flight are put back and recompute their prefix under the new weights.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._serve(version)

    def load_adapter(
        self,
        version: int,
        tensors: Iterable[tuple[str, torch.Tensor]],
        rank: int,
        alpha: float,
        targets: Sequence[str],
    ) -> None:
        """Serve the model with a LoRA adapter (PEFT's names) beside it, in place of the last.

        The engine must have been started for adapters. Raises `SyncError` where rank, targets and
        tensors do not belong together.
        """
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        form = PEFTHelper(r=rank, lora_alpha=alpha, target_modules=list(targets))
        worker = self._engine.engine_core.engine_core.model_executor.driver_worker.worker
        place_adapter(worker.model_runner.lora_manager, form, _ADAPTER, tensors)
        self._adapter = LoRARequest("policy", _ADAPTER, "memory")
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._serve(version)

    def forget(self) -> None:
        self._engine.reset_prefix_cache()

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
                continue
            key = self._owners.pop(output.request_id)
            group = self._groups[key]
            index, _ = group.requests.pop(output.request_id)
            group.samples[index] = self._to_sample(output.outputs[0], group.begun[index])
            self._deliver(key)

    def _deliver(self, key: str) -> None:
        """Hand a group out once all of it is there."""
        if not self._groups[key].requests:
            samples = self._groups.pop(key).samples
            self._finished.append((key, [sample for sample in samples if sample is not None]))

    def _to_sample(self, completion: Any, begun: Sample | None) -> Sample:
        tokens = tuple(completion.token_ids)
        versions = np.full(len(tokens), self.version, np.int32)
        spans = completion.weight_versions or []
        for span in spans:
            versions[span.start : span.end] = int(span.version)
        whole = begun.token_ids + tokens if begun else tokens
        sample = Sample(
            token_ids=tokens,
            logprobs=np.array(completion.logprobs.logprobs, np.float32),
            versions=versions,
            text=self._tokenizer.decode(whole, skip_special_tokens=True),
            finish_reason=completion.finish_reason or "abort",
        )
        return join_samples(begun, sample, sample.text) if begun else sample


def _set_environment() -> None:
    """vLLM reads these when the engine is built."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _adapter_options(adapter: AdapterForm | None) -> dict[str, Any]:
    """What vLLM is told because an adapter is to come."""
    if adapter is None:
        return {}
    room = next((size for size in _RANKS if size >= adapter.rank), adapter.rank)
    # Without the targets it cannot give a prompt's log-probabilities (0.32).
    targets = list(adapter.targets)
    return {"enable_lora": True, "max_lora_rank": room, "lora_target_modules": targets}


def _device_options(
    on_gpu: bool, max_length: int, kv_cache_mb: int, gpu_memory_share: float | None
) -> dict[str, Any]:
    """What vLLM is told because of where it runs."""
    if on_gpu:
        return {} if gpu_memory_share is None else {"gpu_memory_utilization": gpu_memory_share}
    return {
        # Compilation takes longer than a small model's whole run and gains little there.
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_cache_mb << 20,
        # A prompt that is read in pieces turns its generator back after each, which generators of
        # CPU tensors cannot (vLLM 0.32): here every prompt is read at once.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(2048, max_length),
    }


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
