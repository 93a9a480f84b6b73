"""What a stage's training costs beyond torch's DDP: `python tests/benchmarks/ddp_overhead.py`.

Two ranks of one thread train the same Llama on the same shards, in the same micro-batches: as plain
loops of `DistributedDataParallel`, once with transformers' model as it is and once with this
project's faster forwards in it, and as the real thing, with Ray Train, the engine, its checks for
numbers that are none, logging and the driver that watches. They take turns; medians are over
rounds. Counted are the steps between two marks, without starting and ending: wall time, and CPU
seconds of every process of the run, those of Ray included. Rates need two idle cores; CPU seconds
less so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raylign.config import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    RayConfig,
    ScheduleConfig,
    WorkersConfig,
)
from raylign.data.packing import PackedShards, ShardWriter, pack, rows_for_step, write_index
from raylign.models.acceleration import accelerate
from raylign.models.loading import initialise
from raylign.models.presets import build_config
from raylign.tokenization.train import train_bpe
from raylign.tracking import METRICS_FILE, GrowingLines

RANKS, ROWS, LENGTH, VOCABULARY = 2, 4, 256, 1024
MODEL = ModelConfig(hidden_size=256, layers=6, heads=4, kv_heads=4, ffn_size=704)
SHAPE = build_config(MODEL, VOCABULARY, pad_id=0, eos_id=1)
FROM = 20
"""Steps before the first mark."""
_TICKS = os.sysconf("SC_CLK_TCK")


def run_rank(shards: Path, steps: int, dtype: str, fast: bool) -> None:
    """One rank of the peer; prints wall and CPU seconds of the steps after `FROM`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = initialise(SHAPE, 0).train()
    if fast:
        accelerate(model)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    groups = [
        {"params": [p for p in ddp.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in ddp.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    rows = PackedShards(shards, "train")
    context = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    wall = processor = 0.0
    for step in range(steps):
        if step == FROM:
            wall, processor = time.perf_counter(), time.process_time()
        chosen = rows_for_step(rows.rows, 0, step, RANKS * ROWS)[rank * ROWS : (rank + 1) * ROWS]
        tokens = torch.from_numpy(rows.read(chosen)[0].astype(np.int64))
        with context:
            logits = ddp(input_ids=tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
        )
        loss.backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = [time.perf_counter() - wall, time.process_time() - processor]
    sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


def measure_peer(shards: Path, steps: int, dtype: str, fast: bool) -> tuple[float, float]:
    """Wall and CPU seconds a step of both ranks."""
    command = [sys.executable, __file__, "--rank", str(shards), "--steps", str(steps)]
    command += ["--dtype", dtype] + ["--fast"] * fast
    ranks = []
    for rank in range(RANKS):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581", "WORLD_SIZE": str(RANKS)}
        environment = os.environ | place | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in ranks]
    counted = steps - FROM
    return max(f[0] for f in found) / counted, sum(f[1] for f in found) / counted


class Marks(threading.Thread):
    """Notes wall and CPU time of all processes below this one whenever a step is logged."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.metrics, self.over = metrics, threading.Event()
        self.seen: list[tuple[int, float, float]] = []

    def run(self) -> None:
        lines = GrowingLines(self.metrics)
        while not self.over.wait(0.05):
            rows = lines.read()
            step = rows[-1]["step"] if rows else 0
            if step >= FROM and (not self.seen or step > self.seen[-1][0]):
                self.seen.append((step, time.perf_counter(), sum_cpu_seconds()))

    def rate(self) -> tuple[float, float]:
        """Wall and CPU seconds a step between the first mark and the last but one, after which
        the run begins to end."""
        (first, *begin), (last, *end) = self.seen[0], self.seen[-2]
        return tuple((b - a) / (last - first) for a, b in zip(begin, end, strict=True))  # type: ignore[return-value]


def sum_cpu_seconds() -> float:
    """Of this process and all below it."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:  # it has ended
                continue
            fields = text[text.rindex(")") + 2 :].split()
            children.setdefault(int(fields[1]), []).append(int(entry))
            used[int(entry)] = (int(fields[11]) + int(fields[12])) / _TICKS
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        total += used[process]
    return total


def measure_loop(shards: Path, steps: int, engine: EngineConfig) -> tuple[float, float]:
    """Wall and CPU seconds a step of the supervised loop on two Ray workers."""
    from raylign.models.assembly import ModelPlan
    from raylign.tracking import ProgressBoard
    from raylign.training.loop import SupervisedTask
    from raylign.training.objectives import LanguageObjective
    from raylign.training.supervised import train

    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        task = SupervisedTask(
            name="pretrain",
            output=output,
            model=ModelPlan(SHAPE, seed=0),
            tokenizer=shards / "spell",
            objective=LanguageObjective(shards, "corpus", isolate=False),
            seed=0,
            steps=steps,
            batch_size=RANKS * ROWS,
            micro_batch_size=ROWS,
            checkpoint_every=steps,
            optimizer=OptimizerConfig(lr=1e-3),
            schedule=ScheduleConfig(),
            engine=engine,
            threads=1,
            prompts=(),
            sample_tokens=1,
        )
        marks = Marks(output / METRICS_FILE)
        marks.start()
        with ProgressBoard() as board, board.bar("train", steps) as bar:
            train(task, WorkersConfig(count=RANKS), bar)
        marks.over.set()
        marks.join()
    return marks.rate()


def write_shards(directory: Path) -> None:
    """Documents of random tokens, and a tokenizer that goes with them."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, VOCABULARY, 900) for _ in range(600)]
    tokens, segments = pack(documents, LENGTH, eos=1, pad=0)
    writers = {}
    for split, part in (("train", slice(8, None)), ("validation", slice(0, 8))):
        writers[split] = ShardWriter(directory, split, VOCABULARY)
        writers[split].write(tokens[part], segments[part])
    write_index(directory, LENGTH, VOCABULARY, "none", writers)
    train_bpe([f"{n} apples " for n in range(999)], 264).save_pretrained(directory / "spell")


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", choices=("torch", "deepspeed"), default="torch")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fast", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank, options.steps, options.dtype, options.fast)
        return
    from raylign.runtime import connect, disconnect

    engine = EngineConfig(backend=options.backend, zero_stage=0, dtype=options.dtype)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name)
        write_shards(shards)
        connect(RayConfig(num_cpus=RANKS))
        for _ in range(options.rounds):
            for who, fast in (("DDP, plain model", False), ("DDP, same forwards", True)):
                result = measure_peer(shards, options.steps, options.dtype, fast)
                found.setdefault(who, []).append(result)
            result = measure_loop(shards, options.steps, engine)
            found.setdefault("supervised loop", []).append(result)
        disconnect()
    wall, cpu = (
        {
            who: statistics.median(result[kind] for result in results)
            for who, results in found.items()
        }
        for kind in (0, 1)
    )
    for who in found:
        sys.stdout.write(
            f"{who:<20} {RANKS * ROWS * LENGTH / wall[who]:>8,.0f} tokens/s  "
            f"{1e3 * cpu[who]:>7.0f} CPU ms a step  overhead of the loop: "
            f"wall {wall['supervised loop'] / wall[who] - 1:+.1%}, "
            f"CPU {cpu['supervised loop'] / cpu[who] - 1:+.1%}\n"
        )


if __name__ == "__main__":
    main()
