"""Weight sync: from the learner's tensors to an engine that serves them, against one memcpy.

    python tests/benchmarks/weight_sync.py --sizes 1M 25M 125M

The learner is this process, the engine is vLLM in a Ray actor, one thread each. `transfer` is
publishing and, in the worker, receiving and proving every byte; `served` is publishing and loading
into the engine, `proved` with the canary's forward pass besides; `reload` is `served` by vLLM's own
way. Each is the median of the rounds in ms, then its ratio to copying as many bytes once between
two warm buffers, measured in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import ray
import torch

from actors.transports import Transport
from actors.weights import (
    Canary,
    WeightManifest,
    build_transport,
    prove_weights,
    publish_weights,
    receive_weights,
)
from raylign.config import RayConfig
from raylign.models.logprobs import score_tokens
from raylign.runtime import connect, disconnect

# hidden, layers, heads, heads of keys, intermediate, vocabulary; the head is tied
SIZES = {
    "1M": (128, 4, 4, 2, 352, 512),
    "25M": (512, 8, 8, 4, 1408, 4096),
    "125M": (768, 12, 12, 4, 3072, 32000),
}
WAYS = ("transfer", "served", "proved", "reload")
CANARY = tuple(tuple(range(3, 35)) for _ in range(4))


def build_model(size: str, dtype: str, directory: Path) -> Any:
    """A random model of the size in `directory`, for the engine; returned for the learner."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, kv_heads, intermediate, words = SIZES[size]
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(shape).to(getattr(torch, dtype)).eval()
    model.save_pretrained(directory)
    vocabulary = {f"w{index}": index for index in range(words)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
    ).save_pretrained(directory)
    return model


@ray.remote(num_cpus=0)
class Worker:
    """One engine."""

    def __init__(self, model: Path, dtype: str) -> None:
        from raylign.inference.generator import build_generator
        from raylign.inference.vllm_weights import plan_weights

        self._generator: Any = build_generator(
            "vllm",
            model,
            dtype=dtype,
            max_length=64,
            kv_cache_mb=64,
            max_sequences=8,
            threads=1,
            seed=0,
        )
        self._plan = plan_weights(self._generator._model())

    def transfer(self, manifest: WeightManifest) -> None:
        for _ in receive_weights(manifest):
            pass

    def served(self, manifest: WeightManifest) -> None:
        assert self._plan is not None
        self._plan.load(receive_weights(manifest))
        self._generator._engine.reset_prefix_cache(reset_running_requests=True)
        self._generator._serve(manifest.version)

    def proved(self, manifest: WeightManifest) -> None:
        self.served(manifest)
        prove_weights(self._generator, manifest, 1e-2)

    def reload(self, manifest: WeightManifest) -> None:
        from raylign.inference import vllm_generator

        engine = self._generator._engine
        engine.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": receive_weights(manifest)}
        )
        vllm_generator._repack_tied_heads(self._generator._model())
        engine.reset_prefix_cache(reset_running_requests=True)


def measure_ms(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure_transport(
    transport: Transport, worker: Any, model: Any, rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Milliseconds of a memcpy and of each way, a round at a time after one to warm up."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        scores = [score_tokens(model, torch.tensor([s]))[0][0].float().numpy() for s in CANARY]
    canary = Canary(CANARY, tuple(scores))
    source = np.ones(sum(t.nbytes for t in weights.values()), np.uint8)
    target = np.zeros_like(source)
    copies: list[float] = []
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    version = 0
    for _ in range(rounds + 1):
        copies.append(min(measure_ms(lambda: np.copyto(target, source)) for _ in range(3)))
        for way in WAYS:
            version += 1

            def sync(way: str = way, version: int = version) -> None:
                manifest = publish_weights(version, weights.items(), canary, transport)
                ray.get(getattr(worker, way).remote(manifest))

            times[way].append(measure_ms(sync))
    return copies[1:], {way: found[1:] for way, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    names = ("shared_memory", "object_store", "broadcast")
    parser.add_argument("--transports", nargs="+", choices=names, default=list(names))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect(RayConfig(num_cpus=2))
    head = " | ".join(f"{way} ms | x" for way in WAYS)
    print(f"| parameters | MiB | memcpy ms | transport | {head} |")
    print("|---" * (4 + 2 * len(WAYS)) + "|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as directory:
            model = build_model(size, options.dtype, Path(directory))
            worker = Worker.remote(Path(directory), options.dtype)
            ray.get(worker.__ray_ready__.remote())
        count = sum(p.numel() for p in model.parameters())
        total = sum(p.nbytes for p in model.parameters())
        for name in options.transports:
            transport = build_transport(name)
            copies, times = measure_transport(transport, worker, model, options.rounds)
            copy = statistics.median(copies)
            cells = []
            for way in WAYS:
                ratios = [t / c for t, c in zip(times[way], copies, strict=True)]
                cells.append(f"{statistics.median(times[way]):.1f}")
                cells.append(f"{statistics.median(ratios):.1f}")
            row = [f"{count / 1e6:.1f}M", f"{total / 2**20:.1f}", f"{copy:.2f}", name, *cells]
            print(f"| {' | '.join(row)} |", flush=True)
            transport.close()
        ray.kill(worker)
    disconnect()


if __name__ == "__main__":
    main()
