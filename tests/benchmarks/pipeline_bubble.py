"""How long the stages of a pipeline wait: `python tests/benchmarks/pipeline_bubble.py [STEPS]`.

Two ranks of one thread each hold half of the layers. Prints, for 2, 4 and 8 micro-batches a step,
the share of the time between the first and the last operation of a step in which each stage only
waited, beside what the schedule cannot avoid: (S - 1) / (M + S - 1). Needs two idle cores to mean
anything.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import torch
import torch.distributed as dist

from raylign.config import EngineConfig, ModelConfig, OptimizerConfig
from raylign.models.loading import initialise
from raylign.models.presets import build_config
from raylign.training.engine import build_engine
from raylign.training.objectives import LanguageObjective
from raylign.training.pipeline_engine import PipelineEngine
from raylign.training.pipeline_link import Link
from raylign.training.rows import TextRows

STAGES, ROWS, LENGTH, VOCABULARY = 2, 2, 256, 1024
# Wide and deep enough that the head is a small part, and both stages take about as long.
SHAPE = ModelConfig(hidden_size=256, layers=8, ffn_size=768, heads=4, kv_heads=4, context=LENGTH)


def run_rank(rank: int, port: str, steps: int) -> None:
    """Prints, for each number of micro-batches, the share of a step that this stage waited."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=STAGES,
        timeout=timedelta(seconds=120),
    )
    model = initialise(build_config(SHAPE, VOCABULARY, pad_id=0, eos_id=1), 0)
    engine = build_engine(EngineConfig(pipeline_parallel=STAGES), model, OptimizerConfig())
    waited = _time_waits()
    objective = LanguageObjective(Path(), "corpus")
    tokens = np.random.default_rng(0).integers(4, VOCABULARY, (ROWS, LENGTH))
    trained = np.ones((ROWS, LENGTH), bool)
    trained[:, 0] = False
    whole = TextRows(tokens, np.ones_like(tokens), trained)
    batch = objective.assemble(whole, slice(0, ROWS), 0)
    for count in (2, 4, 8):
        loss = partial(objective.loss, totals={"tokens": count * ROWS * (LENGTH - 1)})
        shares = []
        for _ in range(steps):
            dist.barrier()
            waited.clear()
            started = time.perf_counter()
            engine.accumulate([batch] * count, loss)
            busy = time.perf_counter() - started - sum(waited)
            dist.barrier()  # until the slowest stage has finished
            shares.append(1 - busy / (time.perf_counter() - started))
            engine.step(1e-4)
        print(count, statistics.median(shares[1:]), flush=True)
    dist.destroy_process_group()


def _time_waits() -> list[float]:
    """Seconds of every wait for another stage, from now on."""
    waited: list[float] = []

    def time_calls(kind: Any, name: str) -> None:
        wait = getattr(kind, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                waited.append(time.perf_counter() - started)

        setattr(kind, name, timed)

    time_calls(Link, "exchange")
    time_calls(PipelineEngine, "_share")
    return waited


def main(steps: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", str(rank), port, str(steps)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(STAGES)
    ]
    tables = [dict(line.split() for line in r.communicate()[0].splitlines()) for r in ranks]
    sys.stdout.write("micro-batches   idle: theory   stage 0   stage 1   ratio of the mean\n")
    for count in tables[0]:
        idle = [float(table[count]) for table in tables]
        theory = (STAGES - 1) / (int(count) + STAGES - 1)
        ratio = statistics.mean(idle) / theory
        sys.stdout.write(
            f"{count:>13}   {theory:>12.2f}   {idle[0]:>7.2f}   {idle[1]:>7.2f}   {ratio:>17.2f}\n"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
