"""What the controller costs: `python tests/benchmarks/control_plane.py [--workers 1000]`.

The real controller, dispatcher, pool, ledger, buffer and batch files, with stubs in place of
engines, rewards and learner: a stub answers as soon as it is asked, with completions that have to
be unpickled as if they had come from another process. What the stubs do is counted in, too.

Prints processor time a completion, and how many a second one core could pass on, beside what as
many engines of a 7-billion model would make: 2,500 tokens a second each (a round figure for vLLM on
one H100), in completions of `--tokens`. A ratio above 1 means that engines, not the controller, set
the pace.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pickle
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np

from actors.controller import Controller, Crew
from actors.learner import LearnerReport
from actors.reward import Scores
from actors.rollout import Answer, Errand, Pulse, Rollout
from actors.rollout_pool import RolloutPool
from actors.run_files import RunFiles
from actors.weights import Canary, SyncProof, WeightManifest
from raylign.config import AlignConfig
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Scored
from raylign.tracking import Metric

ENGINE_TOKENS = 2500.0
"""A second, of one engine of the class."""
GROUP = 8


class Method:
    """What calls a stub as if it were remote."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> Any:
        return asyncio.ensure_future(self._function(*arguments))


class StubWorker:
    """Answers at once, with completions of some length."""

    def __init__(self, name: str, packed: bytes) -> None:
        self._name, self._packed = name, packed
        self._answers: list[Answer] = []
        self._some = asyncio.Event()
        self._steps = 0
        self.version = 0
        for method in ("ping", "adopt", "submit", "pulse", "withdraw"):
            setattr(self, method, Method(getattr(self, f"_{method}")))

    async def _ping(self) -> str:
        return self._name

    async def _adopt(self, manifest: WeightManifest, *_: Any) -> SyncProof:
        self.version = manifest.version
        return SyncProof(manifest.version, manifest.checksum, 0.0, time.time(), time.time())

    async def _submit(self, errands: Sequence[Errand], ordered: bool) -> None:
        for errand in errands:
            made: list[Trajectory] = pickle.loads(self._packed)
            for trajectory in made:
                trajectory.versions[trajectory.loss_mask] = self.version
            rollout = Rollout(tuple(made), self._name, time.time(), time.time())
            self._answers.append(Answer(errand.key, rollout))
        self._steps += 1
        self._some.set()

    async def _pulse(self, wait_s: float) -> Pulse:
        if not self._answers:
            self._some.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._some.wait()
        answers, self._answers = tuple(self._answers), []
        return Pulse(answers, self._steps, False, "")

    async def _withdraw(self, keys: Sequence[str]) -> None:
        return None


class StubScorer:
    """One for each even, nothing for each odd."""

    scalable: Mapping[str, Any] = {}

    async def score(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Scores:
        kept = [t.scored(float(n % 2), {"correct": n % 2}) for n, t in enumerate(trajectories)]
        return Scores(Scored(kept, []), "reward-0", time.time(), time.time())

    def settle(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        return list(trajectories)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return None

    def take_metrics(self) -> dict[str, float]:
        return {}

    def stop(self) -> None:
        return None


class StubLearner:
    """Learns nothing, at once."""

    def __init__(self) -> None:
        self._version, self.restarts = 0, 0

    def _manifest(self) -> WeightManifest:
        return WeightManifest(self._version, (), Canary((), ()))

    async def start(self, start: Any) -> tuple[WeightManifest, list[Any]]:
        return self._manifest(), []

    async def update(self, batch: Any) -> LearnerReport:
        self._version += 1
        rows = len(batch.trajectories)
        now = time.time()
        return LearnerReport({"kl": Metric(0.0)}, 0.0, (0.0,) * rows, {}, now, now)

    async def publish(self) -> WeightManifest:
        return self._manifest()

    async def save(self, progress: Mapping[str, Any]) -> list[Any]:
        return []

    async def settle(self) -> list[Any]:
        return []

    async def export(self) -> dict[str, Any]:
        return {}


class StubJournal:
    """Hears everything."""

    last_step = -1

    def event(self, **fields: Any) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rollouts(self, *arguments: Any) -> None: ...

    def unlearned(self, *arguments: Any) -> None: ...

    def rewind(self, step: int, undone: str = "") -> None: ...


class Prompts:
    """Different ones, without end."""

    def choose(self, step: int, again: int, count: int) -> list[Prompt]:
        return [Prompt(f"{step}-{again}-{n}", (1, 2, 3), "", "") for n in range(count)]

    def seed(self, request: str, attempt: int) -> int:
        return 0


def pack_group(tokens: int) -> bytes:
    """Completions as they come from a worker."""
    mask = np.arange(tokens + 3) >= 3
    made = [
        Trajectory(
            prompt_id="p",
            group_id="g",
            token_ids=np.arange(tokens + 3, dtype=np.int32),
            loss_mask=mask,
            logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
            finish_reason="stop",
            text="x" * (4 * tokens),
        )
        for _ in range(GROUP)
    ]
    return pickle.dumps(made, protocol=5)


async def measure(workers: int, tokens: int, steps: int, prompts: int) -> tuple[float, int]:
    """Processor seconds of a run's steps, and completions that they passed on."""
    config = AlignConfig(
        steps=steps,
        prompts_per_step=prompts,
        group_size=GROUP,
        max_staleness=1,
        checkpoint_every=10**6,
        rollout={"count": workers, "max_sequences": 256, "stall_s": 60.0},  # type: ignore[arg-type]
    )
    packed = pack_group(tokens)
    pool = RolloutPool(
        config.rollout,
        lambda name: StubWorker(name, packed),  # type: ignore[arg-type,return-value]
        lambda worker, proof: None,
    )
    with tempfile.TemporaryDirectory() as name:
        files = RunFiles(Path(name))
        crew = Crew(pool, StubScorer(), StubLearner())  # type: ignore[arg-type]
        controller = Controller(config, crew, Prompts(), StubJournal(), files)  # type: ignore[arg-type]
        started = time.process_time()
        totals = await controller.run()
        seconds = time.process_time() - started
    assert totals.dispatched == totals.trained == steps * prompts * GROUP
    return seconds, totals.trained


def main() -> None:
    """Measure, and print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--tokens", type=int, default=1000, help="of a completion")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=512, help="a step")
    options = parser.parse_args()
    for workers in options.workers:
        seconds, completions = asyncio.run(
            measure(workers, options.tokens, options.steps, options.prompts)
        )
        able = completions / seconds
        needed = workers * ENGINE_TOKENS / options.tokens
        sys.stdout.write(
            f"{workers:>5} workers  {1e3 * seconds / completions:.3f} CPU ms a completion, "
            f"{able:>7,.0f} a second on one core; engines make {needed:>6,.0f}: "
            f"ratio {able / needed:.1f}\n"
        )


if __name__ == "__main__":
    main()
