"""What a verdict on a program costs: the sandbox against a bare `python -c` of the same program.

    PYTHONPATH=platform:. python tests/benchmarks/sandbox.py [SAMPLES]

Milliseconds of wall time a sample, one after the other, and their ratio. Both start an interpreter
for every sample; the bare one has no walls, no limits and inherits everything.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from raylign.config import SandboxConfig
from raylign.rewards.confinement import survey_walls
from raylign.rewards.programs import CodeVerifier

PROGRAM = "def add(a, b):\n    return a + b\n"
STREAMS = "print(sum(map(int, input().split())))"


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    verify = CodeVerifier(SandboxConfig())
    values = json.dumps({"tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]})
    script = json.dumps({"tests": "def check(add):\n    assert add(1, 2) == 3", "entry": "add"})
    streams = json.dumps([{"input": "1 2\n", "output": "3"}])
    cases: dict[str, Callable[[], object]] = {
        "bare python -c": lambda: subprocess.run(
            [sys.executable, "-c", f"{PROGRAM}assert add(1, 2) == 3"], check=True
        ),
        "bare python -S -c": lambda: subprocess.run(
            [sys.executable, "-S", "-c", f"{PROGRAM}assert add(1, 2) == 3"], check=True
        ),
        "values": lambda: verify(PROGRAM, values),
        "a check function": lambda: verify(PROGRAM, script),
        "input and output": lambda: verify(STREAMS, streams),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(samples):  # in turn, so that a busy moment hits all alike
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    bare = statistics.median(times["bare python -c"])
    print(f"{survey_walls()}; {samples} samples of each")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{name:20} {median:7.1f} ms a sample   {median / bare:5.2f}x")


if __name__ == "__main__":
    main()
