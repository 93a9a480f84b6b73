"""One rank of a group that trains adapters in many ways: `peft_rank.py DIR RANK WORLD PORT`.

A script, because ranks are processes. The first rank writes what each case found to DIR.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylign.config import AdapterConfig, EngineConfig, OptimizerConfig
from raylign.models.assembly import ModelPlan
from raylign.training.engine import build_engine
from raylign.training.objectives import score_text

ROWS, LENGTH, STEPS, LR = 4, 12, 3, 2e-3
CASES: dict[str, dict[str, Any]] = {
    "lora-zero1": {"zero_stage": 1, "activation_checkpointing": True},
    "lora-zero3": {"zero_stage": 3},
    "lora-bfloat16": {"zero_stage": 1, "dtype": "bfloat16"},
    "loraplus-zero1": {"zero_stage": 1},
    "vera-bfloat16": {"zero_stage": 1, "dtype": "bfloat16"},
    "qlora-zero3": {"zero_stage": 3},
    "dora-zero3": {"zero_stage": 3},
    "loha-zero3": {"zero_stage": 3},
    "prompt-zero3": {"zero_stage": 3},
    "prefix-zero2": {"zero_stage": 2},
}


def kept(parameter: torch.Tensor) -> bool:
    """Whether a weight is whole on every rank also while it is not used."""
    return getattr(parameter, "ds_persist", True)


def train(base: Path, kind: Any, config: EngineConfig) -> dict[str, Any]:
    """Losses over all ranks, gradient norms, and the weights at the end."""
    # Large enough to be shared out at stage 3.
    adapter = AdapterConfig(rank=32) if kind == "loha" else AdapterConfig()
    plan = ModelPlan(base, 3, peft=kind, adapter=adapter, dtype=config.dtype)
    engine = build_engine(config, plan.build(), OptimizerConfig(lr=LR, clip=1.0))
    stream = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 50, (ROWS, LENGTH), generator=stream)
    trained = torch.ones_like(tokens, dtype=torch.bool)
    trained[:, 0] = False
    share = slice(
        engine.rank * ROWS // engine.world_size, (engine.rank + 1) * ROWS // engine.world_size
    )
    found: dict[str, Any] = {"losses": [], "norms": []}
    found["released"] = [n for n, p in engine.lm.named_parameters() if not kept(p)]
    for _ in range(STEPS):
        loss = score_text(engine.module, tokens[share], trained[share]) / trained.sum()
        engine.backward(loss)
        found["norms"].append(engine.step(LR))
        total = loss.detach().float()
        if engine.world_size > 1:
            dist.all_reduce(total)
        found["losses"].append(float(total))
    found["trained"] = {name: t.float().clone() for name, t in engine.exportable().items()}
    found["weights"] = {name: t.float().clone() for name, t in engine.weights().items()}
    return found


def main(directory: Path, rank: int, world: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results = {
        name: train(directory / "base", name.split("-")[0], EngineConfig(**case))
        for name, case in CASES.items()
    }
    if rank == 0:
        torch.save(results, directory / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
