"""What the training loop costs beyond bare torch: `python tests/benchmarks/train_step.py [STEPS]`.

Two ranks of one thread each train the quickstart's model on 4 packed rows a step, once as two
independent loops of bare torch, and once as the real thing: Ray Train, DeepSpeed ZeRO-1, gloo,
logging. Prints tokens a second of both and the ratio; needs two idle cores to mean anything.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import torch

from raylign.config import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    RayConfig,
    ScheduleConfig,
    WorkersConfig,
)
from raylign.data.packing import ShardWriter, attention_mask, pack, positions, write_index
from raylign.models.loading import initialise
from raylign.models.presets import build_config
from raylign.tokenization.train import train_bpe

ROWS, LENGTH, VOCABULARY = 4, 256, 1024
SHAPE = build_config(ModelConfig(), VOCABULARY, pad_id=0, eos_id=1)


def run_bare(steps: int) -> None:
    """One process: prints the median seconds of a step."""
    torch.set_num_threads(1)
    model = initialise(SHAPE, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(4, VOCABULARY, (ROWS, LENGTH))
    segments = (torch.arange(LENGTH) // 100 + 1).expand(ROWS, LENGTH).contiguous()
    mask, places = attention_mask(segments), positions(segments)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    sys.stdout.write(f"{statistics.median(times[3:])}\n")


def measure_bare(steps: int) -> float:
    """Tokens a second of two bare loops side by side."""
    command = [sys.executable, __file__, "bare", str(steps)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seconds = [float(process.communicate()[0].split()[-1]) for process in pair]
    return sum(ROWS * LENGTH / s for s in seconds)


def measure_loop(steps: int) -> float:
    """Tokens a second of the supervised loop on two Ray workers, first window left out."""
    from raylign.models.assembly import ModelPlan
    from raylign.runtime import connect, disconnect
    from raylign.tracking import METRICS_FILE, ProgressBoard, read_lines
    from raylign.training.loop import SupervisedTask
    from raylign.training.objectives import LanguageObjective
    from raylign.training.supervised import train

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _write_shards(directory)
        train_bpe([f"{n} apples " for n in range(999)], 264).save_pretrained(directory / "spell")
        (directory / "out").mkdir()
        task = SupervisedTask(
            name="pretrain",
            output=directory / "out",
            model=ModelPlan(SHAPE, seed=0),
            tokenizer=directory / "spell",
            objective=LanguageObjective(directory, "corpus"),
            seed=0,
            steps=steps,
            batch_size=2 * ROWS,
            micro_batch_size=ROWS,
            checkpoint_every=steps,
            optimizer=OptimizerConfig(),
            schedule=ScheduleConfig(),
            engine=EngineConfig(),
            threads=1,
            prompts=(),
            sample_tokens=1,
        )
        connect(RayConfig(num_cpus=2))
        with ProgressBoard() as board, board.bar("train", steps) as bar:
            train(task, WorkersConfig(), bar)
        disconnect()
        rows = read_lines(directory / "out" / METRICS_FILE)
    return statistics.median(row["tokens_per_second"] for row in rows[2:])


def _write_shards(directory: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, VOCABULARY, 99) for _ in range(2000)]
    tokens, segments = pack(documents, LENGTH, eos=1, pad=0)
    writers = {}
    for split, part in (("train", slice(8, None)), ("validation", slice(0, 8))):
        writers[split] = ShardWriter(directory, split, VOCABULARY)
        writers[split].write(tokens[part], segments[part])
    write_index(directory, LENGTH, VOCABULARY, "none", writers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        run_bare(int(sys.argv[2]))
    else:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
        bare = measure_bare(count)
        loop = measure_loop(count)
        sys.stdout.write(
            f"bare torch, twice   {bare:>9,.0f} tokens/s\n"
            f"supervised loop     {loop:>9,.0f} tokens/s\n"
            f"ratio               {loop / bare:>9.2f}\n"
        )
