"""One rank that trains, is interrupted, and goes on: `resume_rank.py DIR RANK WORLD PORT`.

A script, because ranks are processes. What each case left is read from its directory.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from raylign.config import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    UserError,
)
from raylign.models.assembly import ModelPlan
from raylign.models.presets import build_config
from raylign.training.checkpoints import LATEST
from raylign.training.loop import CHECKPOINTS, SupervisedLoop, SupervisedTask
from raylign.training.objectives import LanguageObjective

VOCABULARY, STEPS, EVERY = 57, 12, 3
SHAPE = ModelConfig(hidden_size=16, layers=1, ffn_size=24, context=32)


class Interruption(ConnectionError):
    """Stands for whatever ends a process."""


def make_task(inputs: Path, output: Path, engine: EngineConfig, dropout: float) -> SupervisedTask:
    """`inputs` holds `shards` and `tokenizer`."""
    output.mkdir(parents=True, exist_ok=True)
    shape = build_config(SHAPE, VOCABULARY, pad_id=0, eos_id=1)
    shape.attention_dropout = dropout
    return SupervisedTask(
        name="pretrain",
        output=output,
        model=ModelPlan(shape, seed=1),
        tokenizer=inputs / "tokenizer",
        objective=LanguageObjective(inputs / "shards", "corpus"),
        seed=2,
        steps=STEPS,
        batch_size=6,
        micro_batch_size=2,
        checkpoint_every=EVERY,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=3),
        engine=engine,
        threads=1,
        prompts=(),
        sample_tokens=5,
        checkpoints=CheckpointConfig(keep=2),
    )


def run_until(task: SupervisedTask, end: int) -> None:
    """Train, and be interrupted before step `end` (counted from 0), when the checkpoint before it
    is there."""
    loop = SupervisedLoop(task)
    take_step, pointer = loop._take_step, task.output / CHECKPOINTS / LATEST
    wanted = f"step-{end // EVERY * EVERY:08d}"

    def stop(step: int, rate: float) -> float:
        if step < end:
            return take_step(step, rate)
        until = time.monotonic() + 120
        while not pointer.exists() or pointer.read_text().strip() != wanted:
            assert time.monotonic() < until, f"no {wanted}"
            time.sleep(0.01)
        raise Interruption

    loop._take_step = stop  # type: ignore[method-assign]
    try:
        loop.run()
    except Interruption:
        return
    raise AssertionError("it was not interrupted")


def list_cases() -> dict[str, EngineConfig]:
    cases = {"torch": EngineConfig(backend="torch")}
    cases |= {f"zero{stage}": EngineConfig(zero_stage=stage) for stage in range(4)}  # type: ignore[arg-type]
    for name, config in list(cases.items()):
        cases[f"{name}-bfloat16"] = config.model_copy(update={"dtype": "bfloat16"})
    cases["tensor"] = EngineConfig(zero_stage=1, tensor_parallel=2)
    del cases["zero2"]  # in float32 its optimizer is that of stage 1
    return cases


def run_all(directory: Path) -> None:
    inputs = directory / "inputs"
    for name, engine in list_cases().items():
        for kind in ("whole", "resumed"):
            # Ranks with some of the heads draw for those alone: compared with plain torch, without.
            dropout = 0.0 if name in ("tensor", "torch") else 0.1
            task = make_task(inputs, directory / kind / name, engine, dropout)
            if kind == "resumed":
                run_until(task, 7)
            SupervisedLoop(task).run()
    # One rank has begun it, and another will end it.
    for stage, end in ((1, 7), (3, 10)):
        engine = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
        task = make_task(inputs, directory / "chain", engine, dropout=0.0)
        run_until(task, end)
    try:
        SupervisedLoop(replace(task, seed=9)).run()
    except UserError as error:
        (directory / f"refusal-{dist.get_rank()}").write_text(str(error))


def main(directory: Path, rank: int, world: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    run_all(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
