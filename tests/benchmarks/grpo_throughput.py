"""GRPO against TRL's trainer: `python tests/benchmarks/grpo_throughput.py RUN [--steps N]`.

RUN is a run directory with finished `corpus` and `sft` stages, as the quickstart leaves it. Both
start from its model and learn the same prompts with the same reward, group size, longest
completion, samples a step, KL weight, learning rate and float32, on the same two cores: ours as
`jobs.align` does it (two vLLM workers, two learner ranks), TRL as one process with two threads or,
with `--trl-processes 2`, as two with one each; `--trl-vllm` lets it generate with vLLM in its own
process. RUN may also be what `chained_sums.py` leaves, with `--longest 320`: solutions with a long
tail, where the quickstart's differ little in length.

Prints trained completion tokens a second (the first step is left out: it waits for caches and
engines), and with `--target R` the seconds of steps until the mean reward of three steps is R.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

PROMPTS, GROUP, KL, RATE, WINDOW = 64, 8, 0.002, 2e-4, 3


@dataclass(frozen=True)
class Work:
    """What both do."""

    run: Path
    steps: int
    longest: int


@dataclass(frozen=True)
class Step:
    seconds: float
    tokens: float
    reward: float


def run_ours(work: Work, staleness: int) -> list[Step]:
    """Steps of `jobs.align`, in a run directory of its own."""
    recipe = ROOT / "jobs" / "recipes" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as name:
        arguments = [
            f"run={name}",
            f"align.model={work.run / 'sft' / 'model'}",
            f"align.prompts={work.run / 'corpus' / 'prompts.jsonl'}",
            f"align.steps={work.steps}",
            f"align.max_staleness={staleness}",
            f"align.prompts_per_step={PROMPTS}",
            f"align.group_size={GROUP}",
            f"align.sampling={{max_tokens: {work.longest}}}",
            f"align.algorithm={{name: grpo, kl_coef: {KL}}}",
            f"align.optimizer={{lr: {RATE}, weight_decay: 0.0}}",
            "align.schedule={shape: constant, warmup_steps: 2}",
            "align.reward={source: arithmetic}",
        ]
        command = [sys.executable, "-m", "jobs.align", str(recipe), *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        rows = (Path(name) / "align" / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(row) for row in rows]
    return [Step(r["step_seconds"], r["sampled_tokens"], r["reward/total"]) for r in parsed]


def run_trl(work: Work, processes: int, vllm: bool, threads: int) -> list[Step]:
    """Steps of TRL's trainer, in processes of its own."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "steps.json"
        command = [sys.executable, __file__, str(work.run), "--peer", str(out)]
        command += ["--steps", str(work.steps), "--longest", str(work.longest)]
        command += ["--trl-vllm"] * vllm
        ranks = []
        for rank in range(processes):
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29591", "RANK": str(rank)}
            place |= {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
            alone = {} if processes == 1 and not vllm else place
            environment = os.environ | alone | {"OMP_NUM_THREADS": str(threads)}
            ranks.append(subprocess.Popen(command, env=environment))
        for process in ranks:
            if process.wait():
                raise SystemExit(f"TRL ended with status {process.returncode}")
        return [Step(**row) for row in json.loads(out.read_text())]


def be_peer(work: Work, out: Path, vllm: bool) -> None:
    """TRL's trainer on this rank."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from raylign.rewards.verifiers import verify_arithmetic

    run, processes = work.run, int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = [json.loads(line) for line in (run / "corpus/prompts.jsonl").read_text().splitlines()]
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": r["prompt"]}], "reference": str(r["reference"])}
            for r in rows
        ]
    )

    def reward(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        parts = [
            verify_arithmetic(c[0]["content"], r)
            for c, r in zip(completions, reference, strict=True)
        ]
        return [p["correct"] + 0.1 * p["format"] for p in parts]

    found: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append({"seconds": time.perf_counter() - self.started})

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any
        ) -> None:
            if "completions/mean_length" in logs:
                tokens = logs["completions/mean_length"] * PROMPTS * GROUP
                found[-1] |= {"tokens": tokens, "reward": logs["reward"]}

    colocated = {"vllm_mode": "colocate", "vllm_max_model_length": work.longest + 160}
    per_device = 64  # rows at once; larger was not faster on this machine
    with tempfile.TemporaryDirectory() as name:
        settings = GRPOConfig(
            output_dir=name,
            max_steps=work.steps,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=PROMPTS * GROUP // per_device // processes,
            num_generations=GROUP,
            max_completion_length=work.longest,
            temperature=1.0,
            beta=KL,
            loss_type="grpo",
            learning_rate=RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta2=0.95,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            use_vllm=vllm,
            **(colocated if vllm else {}),
        )
        model = AutoModelForCausalLM.from_pretrained(run / "sft/model", dtype=torch.float32)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(run / "sft/model", padding_side="left"),
            callbacks=[Clock()],
        )
        trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps([row for row in found if "tokens" in row]))


def rate(steps: list[Step]) -> float:
    """Tokens a second after the first step."""
    return sum(s.tokens for s in steps[1:]) / sum(s.seconds for s in steps[1:])


def reach(steps: list[Step], target: float) -> float | None:
    """Seconds until the mean reward of `WINDOW` steps has reached `target`."""
    for end in range(WINDOW, len(steps) + 1):
        window = steps[end - WINDOW : end]
        if sum(s.reward for s in window) / WINDOW >= target:
            return sum(s.seconds for s in steps[:end])
    return None


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--longest", type=int, default=96)
    parser.add_argument("--target", type=float)
    parser.add_argument("--trl-processes", type=int, default=1)
    parser.add_argument("--trl-vllm", action="store_true")
    parser.add_argument("--only", choices=("ours", "trl"))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = Work(options.run.absolute(), options.steps, options.longest)
    if options.peer:
        be_peer(work, options.peer, options.trl_vllm)
        return
    found: dict[str, list[Step]] = {}
    if options.only != "trl":
        found["ours"] = run_ours(work, options.staleness)
    if options.only != "ours":
        processes = options.trl_processes
        found["TRL"] = run_trl(work, processes, options.trl_vllm, max(1, 2 // processes))
    for who, steps in found.items():
        line = f"{who:<6} {rate(steps):>8,.0f} trained tokens/s, {len(steps)} steps"
        line += f", reward {steps[0].reward:.3f} to {steps[-1].reward:.3f}"
        if options.target is not None:
            seconds = reach(steps, options.target)
            line += f", {options.target:g} after " + (f"{seconds:.0f} s" if seconds else "more")
        sys.stdout.write(line + "\n")
    if len(found) == 2:
        sys.stdout.write(f"ratio  {rate(found['ours']) / rate(found['TRL']):.2f}\n")


if __name__ == "__main__":
    main()
