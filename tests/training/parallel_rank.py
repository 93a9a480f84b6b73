"""One rank of a group that trains a tiny model in parallel: `parallel_rank.py DIR RANK WORLD PORT`.

A script, because ranks are processes. Every rank writes what each case found to DIR.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raylign.config import EngineConfig, ModelConfig, OptimizerConfig
from raylign.models.loading import initialise
from raylign.models.logprobs import score_tokens
from raylign.models.presets import build_config
from raylign.training.engine import Engine, build_engine
from raylign.training.objectives import LanguageObjective
from raylign.training.rows import TextRows, deal

VOCABULARY, ROWS, LENGTH, STEPS = 64, 6, 19, 20
SHAPE = ModelConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, context=32)
OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5)
OBJECTIVE = LanguageObjective(Path(), "corpus")


@dataclass(frozen=True)
class Case:
    """A way of taking the same twenty steps."""

    engine: EngineConfig
    micro_batch: int = 2
    untied: bool = False
    """The head has a weight of its own."""
    steps: int = STEPS


def list_cases(world: int) -> dict[str, Case]:
    """What a group of `world` ranks runs, by name."""

    def case(**keys: Any) -> Case:
        more = {key: keys.pop(key) for key in ("micro_batch", "untied", "steps") if key in keys}
        return Case(EngineConfig(**keys), **more)

    if world == 1:
        return {
            "whole": case(backend="torch", micro_batch=ROWS),
            "whole-untied": case(backend="torch", untied=True),
        }
    if world == 2:
        return {
            **{f"zero{stage}": case(zero_stage=stage) for stage in range(4)},
            **{
                f"zero{stage}-offload": case(zero_stage=stage, offload="optimizer")
                for stage in (1, 2, 3)
            },
            "zero3-offload-all": case(zero_stage=3, offload="all"),
            **{f"tensor-zero{s}": case(zero_stage=s, tensor_parallel=2) for s in (0, 1, 2)},
            "tensor-untied": case(zero_stage=0, tensor_parallel=2, untied=True),
            "tensor-checkpointing": case(
                zero_stage=1, tensor_parallel=2, activation_checkpointing=True
            ),
            **{f"sequence-zero{s}": case(zero_stage=s, sequence_parallel=2) for s in range(4)},
            "sequence-checkpointing": case(
                zero_stage=1, sequence_parallel=2, activation_checkpointing=True
            ),
        }
    return {
        "data-tensor-zero0": case(zero_stage=0, tensor_parallel=2),
        "data-tensor-zero1": case(zero_stage=1, tensor_parallel=2),
        "data-sequence-zero1": case(zero_stage=1, sequence_parallel=2),
        "data-sequence-zero3": case(zero_stage=3, sequence_parallel=2),
        "tensor-sequence-zero1": case(zero_stage=1, tensor_parallel=2, sequence_parallel=2),
        "sequence-of-4": case(zero_stage=0, sequence_parallel=4),
    }


def draw_rows(step: int) -> TextRows:
    """Rows of two or three documents, some with padding on the right; of an odd length."""
    stream = np.random.default_rng(step)
    tokens = stream.integers(0, VOCABULARY, (ROWS, LENGTH))
    segments = np.ones((ROWS, LENGTH), np.int64)
    for row in segments:
        first, second = np.sort(stream.integers(1, LENGTH, 2))
        row[first:], row[second:] = 2, 3
    segments[0], segments[1, LENGTH - 4 :] = 1, 0
    trained = stream.random((ROWS, LENGTH)) < 0.7
    trained[:, 0] = False
    trained[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return TextRows(tokens, segments, trained & (segments > 0))


def build(case: Case, seed: int = 7) -> Engine:
    shape = SHAPE.model_copy(update={"tie_embeddings": not case.untied})
    model = initialise(build_config(shape, VOCABULARY, pad_id=0, eos_id=1), seed)
    return build_engine(case.engine, model, OPTIMIZER)


def take_step(engine: Engine, case: Case, step: int) -> tuple[float, float]:
    """Mean loss of the step over all ranks, and the norm of its gradient."""
    rows = draw_rows(step)
    totals = OBJECTIVE.count(rows)
    parts = deal(ROWS, engine.data_rank, engine.data_ranks, case.micro_batch)
    batches = [OBJECTIVE.assemble(rows, part, step) for part in parts]
    sums = engine.accumulate(batches, partial(OBJECTIVE.loss, totals=totals))
    total, count = engine.sum(sums["loss"]).tolist()
    assert count == totals["tokens"]
    return total / count, engine.step(OPTIMIZER.lr * (step + 1) / STEPS)


def run_case(case: Case) -> dict[str, Any]:
    """Losses, gradient norms, final weights, and what they say of some rows."""
    engine = build(case)
    steps = [take_step(engine, case, step) for step in range(case.steps)]
    found: dict[str, Any] = {"losses": [s[0] for s in steps], "norms": [s[1] for s in steps]}
    found["weights"] = {name: t.float().clone() for name, t in engine.weights().items()}
    with torch.no_grad():
        tokens = torch.from_numpy(draw_rows(99).tokens)
        found["logprobs"] = score_tokens(engine.module, tokens, piece=20)[0]
    return found


def main(directory: Path, rank: int, world: int, port: str, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for name, case in list_cases(world).items():
        if chosen and name not in chosen:
            continue
        results[name] = run_case(case)
    torch.save(results, directory / f"found-{world}-{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
