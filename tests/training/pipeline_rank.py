"""One rank of pipelines that train tiny models in many ways: `pipeline_rank.py DIR RANK PORT...`.

A script, because ranks are processes. Four of them form one group for the first cases, and then two
groups of two that share out the others. Each writes what it found to DIR/rank-R.pt.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from raylign.config import AdapterConfig, EngineConfig, ModelConfig, OptimizerConfig
from raylign.models.adapters import adapt
from raylign.models.loading import initialise
from raylign.models.presets import build_config
from raylign.training.engine import DivergenceError, Engine, build_engine
from raylign.training.fragments import StoredState, write_part
from raylign.training.objectives import LanguageObjective
from raylign.training.rows import TextRows, deal
from raylign.training.sums import Sums

VOCABULARY, LENGTH, STEPS = 64, 24, 20
TIMEOUT_S = 300  # four ranks may have to share one busy core
OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5)
OBJECTIVE = LanguageObjective(Path(), "corpus")
TYPES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Case:
    """A way of training; `micro_batch` is what a rank computes at once."""

    engine: EngineConfig
    model: str = "tied"
    rows: int = 8
    micro_batch: int = 2
    steps: int = 4
    interrupt: bool = False
    """Save after half of the steps, and go on in a new engine that started from other weights."""

    def alone(self) -> Case:
        """The same without a pipeline, in one process, each step's rows at once."""
        return Case(EngineConfig(backend="torch"), self.model, self.rows, self.rows, self.steps)


def pipe(stages: int = 2, **keys: Any) -> EngineConfig:
    return EngineConfig(pipeline_parallel=stages, timeout_s=TIMEOUT_S, **keys)


FOUR = {
    "2x2": Case(pipe(), micro_batch=1, steps=STEPS),
    "2x2-replicas": Case(pipe(zero_stage=0), "untied", micro_batch=1),
    "2x2-bfloat16": Case(pipe(dtype="bfloat16")),
    "2x2-resumed": Case(pipe(), micro_batch=1, interrupt=True),
    "2x2-few-rows": Case(pipe(), rows=3, micro_batch=1),
    "4-stages": Case(pipe(4), micro_batch=1, steps=STEPS),
    "4-stages-one": Case(pipe(4), rows=3, micro_batch=3),
}
PAIRS = (
    {
        "2": Case(pipe(), steps=STEPS),
        "2-untied": Case(pipe(), "untied"),
        "2-bfloat16": Case(pipe(dtype="bfloat16"), steps=STEPS),
        "2-gptj": Case(pipe(), "gptj"),
        "2-lora": Case(pipe(), "lora"),
    },
    {
        "2-checkpointing": Case(pipe(activation_checkpointing=True), micro_batch=1),
        "2-one": Case(pipe(), micro_batch=8),
        "2-bfloat16-resumed": Case(pipe(dtype="bfloat16"), interrupt=True, steps=STEPS),
        **{f"2-{name}": Case(pipe(), name) for name in ("qwen3", "mistral", "gemma")},
    },
)


def build_model(name: str, seed: int) -> PreTrainedModel:
    """A decoder of four layers."""
    config: PreTrainedConfig
    if name == "lora":
        return adapt(build_model("tied", seed), "lora", AdapterConfig(rank=4), seed, base="")
    if name in ("tied", "untied", "gptj"):
        shape = ModelConfig(
            family="gptj" if name == "gptj" else "llama",
            hidden_size=32,
            layers=4,
            ffn_size=48,
            context=32,
            tie_embeddings=name == "tied",
        )
        config = build_config(shape, VOCABULARY, pad_id=0, eos_id=1)
    else:
        windows: dict[str, Any] = {}
        if name == "qwen3":  # the second half of the layers looks less far back
            windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
        config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **TYPES, **HEADS, **windows)
    return initialise(config, seed)


def draw_rows(step: int, rows: int) -> TextRows:
    """Packed rows of several documents, and of different lengths."""
    stream = np.random.default_rng(step)
    tokens = stream.integers(2, VOCABULARY, (rows, LENGTH))
    segments = np.sort(stream.integers(1, 4, (rows, LENGTH)), axis=1)
    lengths = stream.integers(6, LENGTH + 1, rows)
    segments[np.arange(LENGTH)[None] >= lengths[:, None]] = 0
    trained = segments > 0
    trained[:, 0] = False
    trained[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return TextRows(tokens, segments, trained)


def cut(whole: TextRows, engine: Engine, case: Case) -> list[Any]:
    parts = deal(case.rows, engine.data_rank, engine.data_ranks, case.micro_batch)
    return [OBJECTIVE.assemble(whole, part, 0) for part in parts]


def measure_only(
    totals: dict[str, float], lm: PreTrainedModel, hidden: torch.Tensor, batch: Any
) -> Sums:
    return OBJECTIVE.loss(lm, hidden, batch, totals)[1]


def run_case(case: Case, directory: Path) -> dict[str, Any]:
    """Losses, gradient norms, final weights, loss of other rows, and what this rank holds."""
    others = find_weights()
    engine = build_engine(case.engine, build_model(case.model, 7), OPTIMIZER)
    held = sum(size for place, size in find_weights().items() if place not in others)
    found: dict[str, Any] = {"losses": [], "norms": [], "bytes": held}
    for step in range(case.steps):
        if case.interrupt and step == case.steps // 2:
            engine = hand_over(engine, case, directory)
        whole = draw_rows(step, case.rows)
        totals = OBJECTIVE.count(whole)
        function = partial(OBJECTIVE.loss, totals=totals)
        sums = engine.accumulate(cut(whole, engine, case), function)
        found["norms"].append(engine.step(OPTIMIZER.lr * min(1, (step + 1) / 5)))
        total, count = engine.sum(sums["loss"].clone()).tolist()
        assert count == totals["tokens"]
        found["losses"].append(total / count)
    whole = draw_rows(99, case.rows)
    batches = cut(whole, engine, case)
    sums = engine.measure(batches, partial(measure_only, OBJECTIVE.count(whole)))
    total, count = engine.sum(sums["loss"]).tolist()
    found["measured"] = total / count
    weights = engine.weights(everywhere=True)
    found["weights"] = {name: t.float().clone() for name, t in weights.items()}
    found["given"] = len(engine.weights())
    found["buffers"] = {b.dtype for b in engine.lm.buffers() if b.is_floating_point()}
    if not engine.whole:
        found["owned"] = {
            fragment.name: {kind: t.clone() for kind, t in fragment.tensors.items()}
            for fragment in engine.fragments()
        }
        found["held"] = {name: p.detach().clone() for name, p in engine.lm.named_parameters()}
    return found


def hand_over(engine: Engine, case: Case, directory: Path) -> Engine:
    """A new engine of other weights, that goes on from what `engine` has stored."""
    directory.mkdir(exist_ok=True)
    write_part(engine.fragments(), directory / f"{engine.rank}.safetensors")
    dist.barrier()
    engine = build_engine(case.engine, build_model(case.model, 8), OPTIMIZER)
    engine.restore(StoredState(directory))
    return engine


def find_weights() -> dict[int, int]:
    """Address and bytes of those that are alive in this process, whoever holds them."""
    gc.collect()
    held = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]
    return {p.data_ptr(): p.nbytes for p in held}


def diverge() -> dict[str, Any]:
    """What every rank says when one micro-batch has no gradient, and what became of its weights."""
    engine = build_engine(pipe(), build_model("tied", 7), OPTIMIZER)
    before = {name: p.detach().clone() for name, p in engine.lm.named_parameters()}
    whole = draw_rows(0, 8)
    totals = OBJECTIVE.count(whole)
    batches = cut(whole, engine, Case(pipe()))

    def spoil(lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> Any:
        loss, sums = OBJECTIVE.loss(lm, hidden, batch, totals)
        return loss * (float("nan") if engine.data_rank == 1 else 1.0), sums

    engine.accumulate(batches, spoil)
    try:
        engine.step(1e-3)
    except DivergenceError as error:
        same = all(torch.equal(p, before[n]) for n, p in engine.lm.named_parameters())
        return {"said": str(error), "unchanged": same}
    return {"said": "", "unchanged": False}


def refuse() -> list[str]:
    """What is said to whoever calls a part of the model as if it were whole."""
    engine = build_engine(pipe(), build_model("tied", 7), OPTIMIZER)
    tokens = torch.zeros((1, 4), dtype=torch.int64)
    said = []
    calls: list[Callable[[], Any]] = [
        lambda: engine.module(input_ids=tokens),
        lambda: engine.backward(torch.zeros(())),
    ]
    if engine.rank % 2:
        calls.append(lambda: engine.lm(input_ids=tokens))
    for call in calls:
        try:
            call()
        except NotImplementedError as error:
            said.append(str(error))
    return said


def join(rank: int, world: int, port: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )


def main(directory: Path, rank: int, ports: list[str]) -> None:
    torch.set_num_threads(1)
    join(rank, 4, ports[0])
    found: dict[str, Any] = {"diverged": diverge()}
    for name, case in FOUR.items():
        found[name] = run_case(case, directory / name)
    dist.destroy_process_group()
    pair = rank // 2
    join(rank % 2, 2, ports[1 + pair])
    found["refused"] = refuse()
    for name, case in PAIRS[pair].items():
        found[name] = run_case(case, directory / name)
    dist.destroy_process_group()
    torch.save(found, directory / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
