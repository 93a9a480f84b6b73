"""Prompts whose solutions have a long tail: `python tests/benchmarks/chained_sums.py RUN OUT`.

Sums of 2 to 32 numbers, in lengths that are log-normal as those of worked solutions are: half of
them have five numbers or fewer, one in a hundred more than 28. RUN is a run directory with finished
`corpus`, `tokenizer` and `pretrain` stages, as the quickstart leaves it. Its model is fine-tuned on
such sums, half of them with their working: that it pays is to be found out.

Leaves a run directory OUT that `grpo_throughput.py OUT --longest 320` starts from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TERMS = range(2, 33)
LONG = 5  # numbers of a sum that is called long
MIDDLE, SPREAD = math.log(3.3), 0.9
WORKED = (0.5, 0.3)  # of short ones and of long ones
EXERCISES, PROMPTS, STEPS = 16_000, 4_000, 500


def draw_sum(rng: random.Random) -> list[int]:
    """Numbers of 1 to 9, as many as `TERMS` allows."""
    terms = TERMS.start + int(rng.lognormvariate(MIDDLE, SPREAD))
    return [rng.randint(1, 9) for _ in range(min(terms, TERMS.stop - 1))]


def ask(numbers: list[int]) -> str:
    """The question."""
    return f"What is {' + '.join(map(str, numbers))}?"


def solve(numbers: list[int], worked: bool) -> str:
    """The answer, after one running total for each number or after none."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    working = "; ".join(steps) if worked else "I can see it."
    return f"<work>{working}</work><answer>{total}</answer>"


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_rows(out: Path) -> Path:
    """Prompts where the benchmark looks for them; returns the file of demonstrations."""
    rng = random.Random("chained sums")
    exercises: list[dict[str, object]] = []
    for _ in range(EXERCISES):
        numbers = draw_sum(rng)
        answer = solve(numbers, rng.random() < WORKED[len(numbers) > LONG])
        turns = [("user", ask(numbers)), ("assistant", answer)]
        exercises.append({"messages": [{"role": r, "content": text} for r, text in turns]})
    prompts: list[dict[str, object]] = []
    for number in range(PROMPTS):
        numbers = draw_sum(rng)
        row = {"id": f"sum-{number}", "prompt": ask(numbers), "reference": str(sum(numbers))}
        prompts.append({**row})
    write_lines(out / "corpus" / "prompts.jsonl", prompts)
    demonstrations = out / "exercises.jsonl"
    write_lines(demonstrations, exercises)
    return demonstrations


def main() -> None:
    """Write the rows and fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    start, out = options.run.absolute(), options.out.absolute()
    command = [sys.executable, "-m", "jobs.sft", str(ROOT / "jobs/recipes/quickstart.yaml")]
    command += [f"run={out}", f"sft.data={write_rows(out)}", f"sft.steps={STEPS}"]
    command += [f"sft.model={start / 'pretrain' / 'model'}", "sft.sequence_length=512"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "platform"), str(ROOT)))}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    main()
