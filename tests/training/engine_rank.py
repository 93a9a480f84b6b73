"""One rank of a group that trains a tiny model in many ways: `engine_rank.py DIR RANK WORLD PORT`.

A script, because ranks are processes. The first rank writes what each case found to DIR.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylign.config import EngineConfig, ModelConfig, OptimizerConfig
from raylign.models.loading import initialise
from raylign.models.logprobs import score_tokens
from raylign.models.presets import build_config
from raylign.training.engine import Engine, build_engine
from raylign.training.fragments import StoredState, write_part
from raylign.training.objectives import score_text

VOCABULARY, ROWS, LENGTH, STEPS = 64, 8, 16, 4
SHAPE = ModelConfig(hidden_size=32, layers=2, ffn_size=48, context=32)
OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5)


@dataclass(frozen=True)
class Case:
    """A way of taking the same four steps."""

    engine: EngineConfig
    splits: tuple[int, ...] = (2, 2, 2, 2)
    """Micro-batches of each step."""
    interrupt: bool = False
    """Save after two steps, and go on in a new engine that started from other weights."""


def list_cases() -> dict[str, Case]:
    cases = {}
    for stage in range(4):
        config = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
        cases[f"zero{stage}"] = Case(config, (1, 1, 1, 1))
        cases[f"zero{stage}-split"] = Case(config, (1, 2, 4, 2))
        cases[f"zero{stage}-resumed"] = Case(config, (1, 2, 4, 2), interrupt=True)
        cases[f"zero{stage}-bfloat16"] = Case(config.model_copy(update={"dtype": "bfloat16"}))
    cases["torch"] = Case(EngineConfig(backend="torch"), (1, 2, 4, 2))
    cases["torch-resumed"] = Case(EngineConfig(backend="torch"), (1, 2, 4, 2), interrupt=True)
    cases["torch-bfloat16"] = Case(EngineConfig(backend="torch", dtype="bfloat16"))
    checkpointed = EngineConfig(zero_stage=3, activation_checkpointing=True)
    cases["zero3-checkpointing"] = Case(checkpointed)
    return cases


def draw_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and trained positions [ROWS, LENGTH] of a step."""
    stream = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=stream)
    trained = torch.rand(ROWS, LENGTH, generator=stream) < 0.7
    trained[:, 0] = False
    return tokens, trained


def build(config: EngineConfig, seed: int) -> Engine:
    model = initialise(build_config(SHAPE, VOCABULARY, pad_id=0, eos_id=1), seed)
    return build_engine(config, model, OPTIMIZER)


def save_state(engine: Engine, directory: Path) -> None:
    """Every rank its own part, on disk when this returns."""
    directory.mkdir(exist_ok=True)
    write_part(engine.fragments(), directory / f"rank-{engine.rank}.safetensors")
    if engine.world_size > 1:
        dist.barrier()


def run_case(case: Case, directory: Path) -> dict[str, Any]:
    """Losses, gradient norms and final weights."""
    engine = build(case.engine, seed=7)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        if case.interrupt and step == 2:
            save_state(engine, directory)
            engine = build(case.engine, seed=8)
            engine.restore(StoredState(directory))
        tokens, trained = draw_batch(step)
        mine = slice(
            engine.rank * ROWS // engine.world_size, (engine.rank + 1) * ROWS // engine.world_size
        )
        total = torch.zeros(())
        pieces = zip(
            tokens[mine].chunk(case.splits[step]),
            trained[mine].chunk(case.splits[step]),
            strict=True,
        )
        for rows, targets in pieces:
            # Small pieces, so that the head is applied, and recomputed, several times.
            loss = score_text(engine.module, rows, targets, piece=20) / trained.sum()
            engine.backward(loss)
            total += loss.detach()
        found["norms"].append(engine.step(OPTIMIZER.lr * (step + 1) / STEPS))
        if engine.world_size > 1:
            dist.all_reduce(total)
        found["losses"].append(float(total))
    found["weights"] = {name: t.float().clone() for name, t in engine.weights().items()}
    tokens, _ = draw_batch(99)
    with torch.no_grad():
        found["logprobs"] = score_tokens(engine.module, tokens, piece=20)[0]
    return found


def wait_in_vain(rank: int) -> float:
    """Seconds until a rank whose peer does not come gives up; 0 when it never does."""
    engine = build(EngineConfig(zero_stage=1, timeout_s=2.0), seed=7)
    if rank == 1:
        time.sleep(6)
        return 0.0
    tokens, trained = draw_batch(0)
    started = time.monotonic()
    try:
        engine.backward(score_text(engine.module, tokens, trained) / 100)
        engine.step(1e-3)
    except RuntimeError:
        return time.monotonic() - started
    return 0.0


def main(directory: Path, rank: int, world: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    chosen = {k: v for k, v in list_cases().items() if world > 1 or k.endswith("split")}
    results: dict[str, Any] = {}
    for name, case in chosen.items():
        results[name] = run_case(case, directory / name)
    if world > 1:
        results["waited"] = wait_in_vain(rank)
    if rank == 0:
        torch.save(results, directory / f"results-{world}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
