"""Training steps beside nanoGPT's own: `python tests/benchmarks/nanogpt.py --nanogpt DIR`.

DIR holds `model.py` of https://github.com/karpathy/nanoGPT, whose model and optimizer are trained
as its `train.py` does: forward, backward, clip, step. Same depth, width, heads and context, about
the same parameters (our SwiGLU is 8/3 wide for its GELU of 4), the same random tokens, dtype and
number of threads. Ours is the engine of every stage on a plain Llama with as many key/value heads
as heads. In bfloat16 both keep float32 masters: nanoGPT by autocast, ours in the engine.

Configurations take turns, each run a process (or two) of its own, and medians are over all rounds.
Besides tokens a second, which means nothing on a busy machine, tokens a second of CPU time are
printed; those move with the machine too, but both sides alike. `--device cuda` needs one card.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import torch
import torch.distributed as dist

from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.loading import initialise
from raylign.training.engine import build_engine
from raylign.training.objectives import score_text

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """Sizes that both models share."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int
    rows: int
    """Of a step, over all ranks."""


SHAPES = {
    "small": Shape(4, 4, 128, 64, 65, 12),  # what nanoGPT's README trains on a CPU
    "shakespeare": Shape(6, 6, 384, 256, 65, 16),
    "long": Shape(6, 6, 384, 1024, 65, 4),
    "gpt2": Shape(12, 12, 768, 1024, 50304, 2),
}


@dataclass(frozen=True)
class Setup:
    """One way of training."""

    who: str
    dtype: str
    ranks: int
    threads: int
    compiled: bool
    micro_batch: int
    """Rows computed at once."""
    shape: str
    rows: int
    kv_heads: int
    device: str
    folder: str

    def __str__(self) -> str:
        place = f"{self.ranks}x{self.threads} threads" if self.device == "cpu" else self.device
        how = "compiled" if self.compiled else "eager"
        return f"{self.who:<8} {self.dtype:<8} {place}, {how}, {self.micro_batch} rows at once"


def build_theirs(setup: Setup, shape: Shape, rows: int) -> tuple[Step, int]:
    """nanoGPT's training step, and its parameters."""
    sys.path.insert(0, setup.folder)
    import model as nanogpt  # type: ignore[import-not-found]

    config = nanogpt.GPTConfig(
        block_size=shape.context,
        vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        dropout=0.0,
        bias=False,
    )
    lm = nanogpt.GPT(config).to(setup.device)
    optimizer = lm.configure_optimizers(0.1, 1e-3, (0.9, 0.99), setup.device)
    run = torch.compile(lm) if setup.compiled else lm
    tokens = draw(shape, rows, setup.device)
    cuts = tokens.split(setup.micro_batch)

    def context() -> AbstractContextManager[object]:
        if setup.dtype == "bfloat16":
            return torch.autocast(setup.device, dtype=torch.bfloat16)
        return nullcontext()

    def step() -> None:
        for cut in cuts:
            with context():
                _, loss = run(cut[:, :-1].contiguous(), cut[:, 1:].contiguous())
            (loss / len(cuts)).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in lm.parameters())


def build_ours(setup: Setup, shape: Shape, rows: int) -> tuple[Step, int]:
    """The engine's training step on this rank, and the model's parameters."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=round(8 * shape.width / 3 / 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=setup.kv_heads or shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
    )
    lm = initialise(config, 0).to(setup.device)
    settings: dict[str, object] = {"backend": "torch", "dtype": setup.dtype}
    if setup.compiled:
        settings["compile"] = True
    engine = build_engine(EngineConfig.model_validate(settings), lm, OptimizerConfig(lr=1e-3))
    mine = rows // setup.ranks
    tokens = draw(shape, rows, setup.device)[engine.rank * mine : (engine.rank + 1) * mine]
    trained = torch.ones_like(tokens, dtype=torch.bool)
    trained[:, 0] = False
    total = rows * shape.context
    cuts = list(zip(tokens.split(setup.micro_batch), trained.split(setup.micro_batch), strict=True))

    def step() -> None:
        for some, wanted in cuts:
            engine.backward(score_text(engine.module, some, wanted) / total)
        engine.step(1e-3)

    return step, sum(p.numel() for p in lm.parameters())


def draw(shape: Shape, rows: int, device: str) -> torch.Tensor:
    """Random tokens [rows, context + 1]."""
    stream = torch.Generator().manual_seed(0)
    size = (rows, shape.context + 1)
    return torch.randint(0, shape.vocabulary, size, generator=stream).to(device)


def run_rank(setup: Setup, steps: int) -> None:
    """Time the steps of one process; prints what it found as one line of JSON."""
    torch.set_num_threads(setup.threads)
    torch.set_float32_matmul_precision("high" if setup.device == "cuda" else "highest")
    if setup.ranks > 1:
        dist.init_process_group("gloo")
    shape = SHAPES[setup.shape]
    build = build_ours if setup.who == "ours" else build_theirs
    began = time.perf_counter()
    step, parameters = build(setup, shape, setup.rows)
    for _ in range(3):
        step()
    settle(setup.device)
    start = time.perf_counter() - began
    walls, processors = [], []
    for _ in range(steps):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        settle(setup.device)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    found = {
        "wall": statistics.median(walls),
        "cpu": statistics.median(processors),
        "parameters": parameters,
        "start": start,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    if setup.ranks > 1:
        dist.destroy_process_group()


def settle(device: str) -> None:
    """Wait for a card to have finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(setup: Setup, steps: int) -> dict[str, float]:
    """Run a setup in processes of its own: seconds a step, CPU seconds a step of all ranks."""
    command = [sys.executable, __file__, "--rank", json.dumps(asdict(setup))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(setup.ranks):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(setup.threads),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(setup.ranks),
        }
        processes.append(
            subprocess.Popen(
                [*command, "--steps", str(steps)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    rows = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{setup} failed:\n{errors[-2000:]}")
        rows.append(json.loads(output.splitlines()[-1]))
    return {
        "wall": max(row["wall"] for row in rows),
        "cpu": sum(row["cpu"] for row in rows),
        "parameters": rows[0]["parameters"],
        "start": max(row["start"] for row in rows),
    }


def take_turns(setups: list[Setup], steps: int) -> dict[Setup, list[dict[str, float]]]:
    """Steps of all setups in turn, in this process, which has one thread: by CPU time."""
    torch.set_num_threads(1)
    sides = []
    for setup in setups:
        build = build_ours if setup.who == "ours" else build_theirs
        sides.append((setup, *build(setup, SHAPES[setup.shape], setup.rows)))
    times: dict[Setup, list[float]] = {setup: [] for setup in setups}
    for _ in range(steps + 2):
        for setup, step, _ in sides:
            began = time.process_time()
            step()
            times[setup].append(time.process_time() - began)
    results = {}
    for setup, _, parameters in sides:
        middle = statistics.median(times[setup][2:])
        found = {"wall": middle, "cpu": middle, "parameters": parameters, "start": 0.0}
        results[setup] = [found]
    return results


def list_setups(options: argparse.Namespace, dtype: str) -> list[Setup]:
    """The configurations of both, theirs and ours in turn."""
    rows = options.rows or SHAPES[options.shape].rows
    sizes = sorted({rows, max(1, rows // 4)})
    common = {
        "dtype": dtype,
        "shape": options.shape,
        "rows": rows,
        "device": options.device,
        "folder": str(options.nanogpt),
    }
    ways = [(1, options.threads)]
    if options.device == "cpu" and options.threads > 1:
        ways.append((options.threads, 1))
    theirs = [
        Setup("nanoGPT", dtype, 1, options.threads, how, size, **_rest(common, 0))
        for how in ((False, True) if options.compile else (False,))
        for size in sizes
    ]
    ours = [
        Setup("ours", dtype, ranks, threads, how, size, **_rest(common, options.kv_heads))
        for ranks, threads in ways
        for how in ((False, True) if options.device == "cuda" else (False,))
        for size in sorted({max(1, rows // ranks), max(1, rows // 4)})
    ]
    pairs = [setup for pair in zip(theirs, ours, strict=False) for setup in pair]
    return pairs + theirs[len(ours) :] + ours[len(theirs) :]


def _rest(common: dict[str, object], kv_heads: int) -> dict[str, object]:
    return {k: v for k, v in common.items() if k != "dtype"} | {"kv_heads": kv_heads}


def report(results: dict[Setup, list[dict[str, float]]], tokens: int) -> None:
    """A line for each setup, and the ratio of the best of each."""
    best: dict[tuple[str, str], float] = {}
    for setup, rounds in results.items():
        wall = statistics.median(r["wall"] for r in rounds)
        cpu = statistics.median(r["cpu"] for r in rounds)
        sys.stdout.write(
            f"{setup!s:<62} {tokens / wall:>9,.0f} tokens/s {tokens / cpu:>9,.0f} tokens/CPU s  "
            f"{rounds[0]['parameters'] / 1e6:.2f}M, {rounds[0]['start']:.0f} s to start\n"
        )
        for what, seconds in (("tokens/s", wall), ("tokens/CPU s", cpu)):
            rate = tokens / seconds
            best[setup.who, what] = max(best.get((setup.who, what), 0.0), rate)
    for what in ("tokens/s", "tokens/CPU s"):
        ratio = best["ours", what] / best["nanoGPT", what]
        sys.stdout.write(f"best of ours to best of nanoGPT, {what:<13} {ratio:.2f}\n")


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    parser.add_argument("--shape", choices=SHAPES, default="shakespeare")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, help="of a step, over all ranks")
    parser.add_argument("--kv-heads", type=int, default=0, help="of ours; as many as heads if 0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--in-turns",
        action="store_true",
        help="one process with one thread, steps in turn, CPU time: for a busy machine",
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(Setup(**json.loads(options.rank)), options.steps)
        return
    if options.in_turns:
        options.threads = 1
    for dtype in options.dtypes:
        setups = list_setups(options, dtype)
        shape = SHAPES[options.shape]
        sys.stdout.write(f"{options.shape}: {shape}\n")
        if options.in_turns:
            alone = [s for s in setups if s.ranks == 1 and s.micro_batch == s.rows]
            report(take_turns(alone, options.steps), setups[0].rows * shape.context)
            continue
        results: dict[Setup, list[dict[str, float]]] = {setup: [] for setup in setups}
        for _ in range(options.rounds):
            for setup in setups:
                results[setup].append(measure(setup, options.steps))
        report(results, setups[0].rows * shape.context)


if __name__ == "__main__":
    main()
