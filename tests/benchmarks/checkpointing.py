"""What a checkpoint costs a training loop: `python tests/benchmarks/checkpointing.py [DIRECTORY]`.

A model of 25 million weights in float32 with Adam's moments (300 MB), plain torch, one process. A
checkpoint of ours is that state hashed and read back, with a ready model directory beside it;
`torch.save` writes the same state with no sum and no model, and is flushed to disk too. What the
steps lose to the thread that writes shows as their rate while it does.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import torch
from safetensors.torch import save_file

from raylign.config import EngineConfig, ModelConfig, OptimizerConfig
from raylign.models.loading import initialise
from raylign.models.presets import build_config
from raylign.training.checkpoints import STATE, find_newest
from raylign.training.engine import build_engine
from raylign.training.fragments import StoredState
from raylign.training.objectives import score_text
from raylign.training.saving import Plan, Saver

SHAPE = ModelConfig(hidden_size=512, layers=7, ffn_size=1408, context=128)
VOCABULARY, ROWS, LENGTH, ROUNDS = 8192, 4, 128, 3


def main(directory: Path) -> None:
    """Prints a table."""
    config = build_config(SHAPE, VOCABULARY, pad_id=0, eos_id=1)
    engine = build_engine(
        EngineConfig(backend="torch"), initialise(config, 0), OptimizerConfig(lr=1e-4)
    )
    weights = sum(p.numel() for p in engine.lm.parameters())
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    trained = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    trained[:, 0] = False

    def step() -> float:
        started = time.perf_counter()
        engine.backward(score_text(engine.module, tokens, trained) / trained.sum())
        engine.step(1e-4)
        return time.perf_counter() - started

    step()
    alone = statistics.median(step() for _ in range(5))
    print(f"{weights / 1e6:.1f} M weights, {12 * weights / 1e6:.0f} MB of state; ", end="")
    print(f"{torch.get_num_threads()} threads; a step takes {alone:.2f} s\n")

    def export(stored: StoredState, folder: Path) -> None:
        folder.mkdir()
        save_file({name: stored.whole(name) for name in stored.names}, folder / "model.safetensors")

    def plainly(round_: int) -> tuple[float, float, list[float]]:
        state = [dict(f.tensors) for f in engine.fragments()]
        started = time.perf_counter()
        with (directory / f"plain-{round_}.pt").open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        seconds = time.perf_counter() - started
        return seconds, seconds, []

    def ours(asynchronous: bool) -> Callable[[int], tuple[float, float, list[float]]]:
        plan = Plan(directory / str(asynchronous), 0, 1, "a", {}, 2, asynchronous, 600.0)
        saver = Saver(plan, export)

        def save(round_: int) -> tuple[float, float, list[float]]:
            started = time.perf_counter()
            saver.save(round_ + 1, engine.fragments(), {})
            while not asynchronous and saver.writing:
                time.sleep(0.002)
            held = time.perf_counter() - started
            steps = []
            while saver.busy:
                steps.append(step())
            seconds = time.perf_counter() - started
            assert [event["what"] for event in saver.take_events()] == ["checkpoint"]
            return held, seconds, steps

        return save

    ways = {"torch.save": plainly, "synchronous": ours(False), "asynchronous": ours(True)}
    found = {name: [way(round_) for round_ in range(ROUNDS)] for name, way in ways.items()}
    plain = statistics.median(held for held, _, _ in found["torch.save"])
    print(f"{'':14}{'held up, s':>12}{'of torch.save':>15}{'all done, s':>13}{'steps then':>12}")
    for name, rows in found.items():
        held = statistics.median(row[0] for row in rows)
        done = statistics.median(row[1] for row in rows)
        steps = [seconds for row in rows for seconds in row[2]]
        pace = f"{statistics.median(steps) / alone:.2f} x" if steps else ""
        print(f"{name:14}{held:12.3f}{held / plain:15.2f}{done:13.2f}{pace:>12}")
    newest, _ = find_newest(directory / "True")
    assert newest is not None
    stored = StoredState(newest[0] / STATE)
    started = time.perf_counter()
    engine.restore(stored)
    print(f"\nread back into the engine in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        main(place)
    finally:
        shutil.rmtree(place)
