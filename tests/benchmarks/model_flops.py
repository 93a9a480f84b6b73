"""How much of the machine's peak a training step uses: `python tests/benchmarks/model_flops.py`.

For models of about 1M, 10M, 30M and 125M parameters: tokens a second, and the floating-point
operations that the model needs for them (6 a parameter and token, and 6 x layers x width x context
for causal attention, forward and backward; Chowdhery et al., 2022, appendix B, halved where a token
sees only those before it) as a share of the best that a square matrix product reached in the same
run, with the same type and number of threads. Then where the rest goes, by the profiler.

CPU time is what is divided by on a CPU with one thread, so that a busy machine does not count; wall
time otherwise. With `--device cuda --sizes 125M --dtype bfloat16` it measures a card, and with
`--nanogpt DIR` nanoGPT's step on the same card. Neither Ray nor a process group is needed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(HERE)]

import torch
from nanogpt import SHAPES, Setup, Shape, Step, build_ours, build_theirs, settle
from torch.profiler import ProfilerActivity, profile

SIZES = {
    "1M": Shape(4, 2, 128, 256, 1024, 8),
    "10M": Shape(6, 6, 384, 256, 1024, 8),
    "30M": Shape(8, 8, 512, 512, 8192, 4),
    "125M": Shape(12, 12, 768, 1024, 50304, 1),
}

# First match wins; names as the profiler of torch reports them.
CATEGORIES = (
    ("matrix products", ("aten::mm", "aten::addmm", "mkldnn", "gemm", "cutlass", "nvjet")),
    ("attention", ("aten::bmm", "softmax", "scaled_dot_product", "flash", "fmha", "cudnn")),
    ("optimizer, clipping", ("adam", "foreach", "vector_norm", "multi_tensor")),
    ("head's softmax", ("aten::exp_", "amax", "scatter", "log")),
    ("embedding", ("embedding", "index")),
    ("copies and casts", ("copy", "fill", "zero", "cat", "memcpy", "memset")),
    ("norms, gates, rotation, sums", ("mul", "add", "sub", "div", "sum", "silu", "rsqrt", "elem")),
)


@dataclass(frozen=True)
class Measurement:
    """Of one kind of step."""

    seconds: float
    tokens: int
    parameters: int

    def flops(self, shape: Shape) -> float:
        """A second, of those that the model needs."""
        attention = 6 * shape.layers * shape.width * shape.context
        return self.tokens / self.seconds * (6 * self.parameters + attention)


def clock(device: str, threads: int) -> Callable[[], float]:
    """What is measured by, see above."""
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def find_peak(dtype: torch.dtype, device: str, now: Callable[[], float]) -> float:
    """Operations a second of the best square matrix product."""
    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192, 16384):
        left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        left @ right
        for _ in range(12):
            settle(device)
            began = now()
            left @ right
            settle(device)
            best = max(best, 2 * size**3 / (now() - began))
    return best


def measure(step: Step, steps: int, device: str, now: Callable[[], float]) -> float:
    """Median seconds of a step."""
    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        settle(device)
        began = now()
        step()
        settle(device)
        times.append(now() - began)
    return statistics.median(times)


def explain(step: Step, device: str) -> list[tuple[str, float]]:
    """Share of a step's time by kind of work; what no operation accounts for is last."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as recorded:
        for _ in range(2):
            step()
        settle(device)
    totals: dict[str, float] = {name: 0.0 for name, _ in CATEGORIES} | {"other, Python": 0.0}
    for event in recorded.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.key.startswith(("Profiler", "Optimizer", "cudaDevice")):
            spent = 0.0
        name = event.key.lower()
        kinds = (kind for kind, words in CATEGORIES if any(word in name for word in words))
        totals[next(kinds, "other, Python")] += spent
    whole = sum(totals.values()) or 1.0
    return [(kind, spent / whole) for kind, spent in totals.items()]


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, help="of a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py: measure it as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high" if options.device == "cuda" else "highest")
    now = clock(options.device, options.threads)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    for dtype in options.dtypes:
        peak = find_peak(getattr(torch, dtype), options.device, now)
        sys.stdout.write(
            f"{machine}, {dtype}, {options.threads} threads: best matrix product "
            f"{peak / 1e9:,.0f} GFLOP/s\n"
        )
        for size in options.sizes:
            shape = SIZES[size]
            shape = replace(shape, rows=options.rows or shape.rows)
            SHAPES[size] = shape
            show(options, size, shape, dtype, peak, now)


def show(
    options: argparse.Namespace,
    size: str,
    shape: Shape,
    dtype: str,
    peak: float,
    now: Callable[[], float],
) -> None:
    """One model: a line of numbers, and one of where the time goes."""
    sides = [("ours", build_ours)] + [("nanoGPT", build_theirs)] * bool(options.nanogpt)
    for who, build in sides:
        setup = Setup(
            who=who,
            dtype=dtype,
            ranks=1,
            threads=options.threads,
            compiled=options.compile,
            micro_batch=shape.rows,
            shape=size,
            rows=shape.rows,
            kv_heads=0,
            device=options.device,
            folder=options.nanogpt or "",
        )
        step, parameters = build(setup, shape, shape.rows)
        seconds = measure(step, options.steps, options.device, now)
        found = Measurement(seconds, shape.rows * shape.context, parameters)
        sys.stdout.write(
            f"{size:>5} {who:<8} {parameters / 1e6:>7.1f}M  {found.tokens / seconds:>10,.0f} "
            f"tokens/s  {found.flops(shape) / 1e9:>9,.1f} GFLOP/s  "
            f"MFU {found.flops(shape) / peak:.2f}\n"
        )
        if who == "ours":
            parts = explain(step, options.device)
            text = ", ".join(f"{kind} {share:.0%}" for kind, share in parts if share >= 0.005)
            sys.stdout.write(f"      {text}\n")
        sys.stdout.flush()
        del step


if __name__ == "__main__":
    main()
