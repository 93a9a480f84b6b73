"""The pool under real Ray: only fresh workers serve, lost work is made again, and workers come, go,
die and hang while requests are in flight."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.rollout import Errand, Rollout, RolloutRequest, RolloutWorker
from actors.rollout_pool import RolloutPool
from actors.supervision import Budget, FleetExhausted, PromptLost
from actors.weights import Canary, SyncProof, WeightManifest, publish_weights
from raylign.config import RolloutConfig, UserError
from raylign.inference.generator import Sampling
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.records import Prompt
from raylign.runtime import worker_env

pytestmark = pytest.mark.slow
PROMPT = Prompt("p", (5, 6, 7), "w1 w2 w3", "")
POISON = Prompt("poison", (50, 6, 7), "w46 w2 w3", "")
SHORT = Sampling(max_tokens=8)
STALL_S, TRANSFER_S = 12.0, 12.0  # two cores that others use, too, are silent for seconds


class ProbeWorker(RolloutWorker):
    """A rollout worker to which things can happen."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._wait_s, self._deaf, self._drawn = 0.0, False, 0
        generator: Any = self._loop._generator
        advance, draw = generator.advance, getattr(generator, "_draw", None)

        def advance_slowly() -> Any:
            time.sleep(self._wait_s)
            return advance()

        def draw_counted(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
            self._drawn += len(scores)
            return draw(scores, sampling)

        generator.advance = advance_slowly
        if draw is not None:
            generator._draw = draw_counted

    def pid(self) -> int:
        return os.getpid()

    def slow_down(self, wait_s: float) -> None:
        """Every step takes so much longer."""
        self._wait_s = wait_s

    def drawn(self) -> int:
        """Tokens sampled since it was last asked."""
        drawn, self._drawn = self._drawn, 0
        return drawn

    def close_its_ears(self) -> None:
        """The next weights never arrive."""
        self._deaf = True

    def adopt(self, manifest: WeightManifest, tolerance: float, restart: bool = False) -> SyncProof:
        if self._deaf:
            time.sleep(3600)
        return super().adopt(manifest, tolerance, restart)

    def submit(self, errands: Sequence[Errand], ordered: bool = False) -> None:
        if any(errand.request.prompt.id == "poison" for errand in errands):
            threading.Timer(0.2, os._exit, (1,)).start()
            self._wait_s = 0.1
        super().submit(errands, ordered)


class Stage:
    """A pool, and what it says of itself, in an event loop that outlives the tests."""

    def __init__(self, model: Path, **changes: Any) -> None:
        options = {
            "backend": "transformers",
            "cpus": 0.2,
            "max_restarts": 9,
            "attempts": 2,
            "stall_s": STALL_S,
        }
        self.config = RolloutConfig(**(options | changes))
        self.model, self.version = model, -1
        self.proofs: list[tuple[str, int]] = []
        self.changes: list[tuple[str, str, str]] = []
        self.handles: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._env = worker_env() | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}

    def play(self, scenario: Callable[[RolloutPool], Coroutine[Any, Any, Any]]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(scenario(self.pool), 120))

    def open(self) -> None:
        async def begin() -> None:
            self.pool = RolloutPool(
                self.config,
                self._spawn,
                lambda name, proof: self.proofs.append((name, proof.version)),
                transfer_deadline_s=TRANSFER_S,
                on_change=lambda *change: self.changes.append(change),
            )
            await self.pool.start(self.next_version())

        self._loop.run_until_complete(begin())

    def close(self) -> None:
        async def end() -> None:
            self.pool.stop()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self._loop.run_until_complete(end())
        self._loop.close()

    def _spawn(self, name: str) -> Any:
        options = {"num_cpus": 0.2, "max_concurrency": 64, "runtime_env": {"env_vars": self._env}}
        actor = ray.remote(ProbeWorker).options(**options)
        self.handles[name] = actor.remote(name, self.model, self.config, 64, 0)
        return self.handles[name]

    def next_version(self) -> WeightManifest:
        self.version += 1
        return manifest_of(self.model, self.version, 0.01 * self.version)

    def losses(self) -> list[str]:
        """Why workers were lost since it was last asked."""
        found = [reason for _, what, reason in self.changes if what == "lost"]
        self.changes.clear()
        return found

    async def settle(self, count: int) -> None:
        """Wait until so many workers serve."""
        while sum(m.serving for m in self.pool._members.values()) != count:
            await asyncio.sleep(0.05)

    async def ask(self, count: int = 8, sampling: Sampling = SHORT) -> list[Rollout]:
        """Groups of two at the current version."""
        work = (self.pool.generate(PROMPT, str(i), sampling, 2, self.version) for i in range(count))
        return list(await asyncio.gather(*work))


def manifest_of(model: Path, version: int, shift: float) -> WeightManifest:
    """The tiny model with every weight moved by `shift`, published with an honest canary."""
    policy = load_model(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(shift)
        sequence = (5, 6, 7, 8, 9)
        scores = score_tokens(policy, torch.tensor([list(sequence)]))[0][0].numpy()
    weights = {name: p.detach() for name, p in policy.named_parameters()}
    return publish_weights(version, weights, Canary((sequence,), (scores,)))


@pytest.fixture(scope="module")
def stage(ray_cluster: None, tiny_model: Path) -> Iterator[Stage]:
    """Two workers that all tests share: who is lost is replaced."""
    stage = Stage(tiny_model, count=2)
    stage.open()
    yield stage
    stage.close()


def test_only_who_proved_a_version_serves_it(stage: Stage) -> None:
    async def scenario(pool: RolloutPool) -> None:
        await stage.settle(2)
        late = asyncio.create_task(pool.generate(PROMPT, "g", SHORT, 2, stage.version + 1))
        await asyncio.sleep(0.3)
        assert not late.done()  # nobody has that version yet
        await pool.publish(stage.next_version())
        version = stage.version
        assert all(t.version_span == (version, version) for t in (await late).trajectories)
        done = await stage.ask(12)
        assert {rollout.worker for rollout in done} == set(pool.names)
        assert [(r.trajectories[0].group_id, len(r.trajectories)) for r in done] == [
            (str(i), 2) for i in range(12)
        ]
        proved = {(name, version) for name in pool.names}
        assert proved <= set(stage.proofs)

    stage.play(scenario)


def test_a_stopped_process_and_a_stuck_engine_are_told_by_their_pulse(stage: Stage) -> None:
    async def scenario(pool: RolloutPool) -> None:
        await stage.settle(2)
        stopped, stuck = pool.names
        await stage.handles[stuck].slow_down.remote(3600)
        work = asyncio.create_task(stage.ask(4))
        os.kill(await stage.handles[stopped].pid.remote(), signal.SIGSTOP)
        assert [len(r.trajectories) for r in await work] == [2] * 4
        reasons = stage.losses()
        assert any(r.startswith(f"{stopped}: silent for {STALL_S:g} s") for r in reasons)
        assert any(r.startswith(f"{stuck}: no token in {STALL_S:g} s, with ") for r in reasons)

    stage.play(scenario)


def test_a_prompt_that_kills_workers_is_set_aside_alone(stage: Stage) -> None:
    async def scenario(pool: RolloutPool) -> None:
        await stage.settle(2)
        before = pool.names
        await asyncio.gather(*(stage.handles[n].slow_down.remote(0.02) for n in before))
        bad = asyncio.create_task(pool.generate(POISON, "bad", SHORT, 2, stage.version))
        done = await stage.ask(12)
        assert [len(r.trajectories) for r in done] == [2] * 12
        with pytest.raises(PromptLost, match="prompt poison is set aside: 2 workers were lost"):
            await bad
        reasons = stage.losses()
        assert [reason.partition(":")[2][:10] for reason in reasons] == [" ActorDied"] * 2
        await stage.settle(2)
        # Successors proved the current version, and no other, before they served.
        for successor in set(pool.names) - set(before):
            assert [v for name, v in stage.proofs if name == successor] == [stage.version]
        assert len(await stage.ask(2)) == 2

    stage.play(scenario)


def test_who_does_not_take_new_weights_is_named_and_replaced(stage: Stage) -> None:
    async def scenario(pool: RolloutPool) -> None:
        await stage.settle(2)
        deaf = pool.names[1]
        await stage.handles[deaf].close_its_ears.remote()
        await pool.publish(stage.next_version())
        assert stage.losses() == [
            f"{deaf}: version {stage.version} not proved within {TRANSFER_S:g} s"
        ]
        assert len(await stage.ask(4)) == 4

    stage.play(scenario)


def test_what_nobody_waits_for_is_not_sampled(stage: Stage) -> None:
    async def scenario(pool: RolloutPool) -> None:
        await stage.settle(2)
        for name in pool.names:
            await stage.handles[name].slow_down.remote(0.2)
        work = asyncio.create_task(stage.ask(4, Sampling(max_tokens=50)))
        await asyncio.sleep(0.5)
        work.cancel()
        started = time.monotonic()
        while any(member.work for member in pool._members.values()):
            await asyncio.sleep(0.05)
        assert time.monotonic() - started < 6  # of the ten that it would take
        assert pool.take_idle_seconds() > 0

    stage.play(scenario)


def test_workers_come_and_what_those_that_go_began_goes_on(stage: Stage, tiny_model: Path) -> None:
    async def scenario(pool: RolloutPool) -> None:
        await stage.settle(2)
        grown, same = await asyncio.gather(pool.scale(3), pool.scale(3))
        assert (grown, same) == ("2 -> 3 workers", "3 -> 3 workers")
        names = pool.names
        for name in names:
            await stage.handles[name].slow_down.remote(0.05)
            await stage.handles[name].drawn.remote()
        long = Sampling(max_tokens=40, seed=4)
        work = asyncio.create_task(stage.ask(6, long))
        await asyncio.sleep(1.2)
        assert await pool.scale(1) == "3 -> 1 workers"
        assert pool.names == names[:1]  # the newest went
        [last] = names[:1]
        done = await work
        assert {rollout.worker for rollout in done} == {last}
        trajectories = [t for rollout in done for t in rollout.trajectories]
        sampled = sum(t.sampled_tokens for t in trajectories)
        drawn = await stage.handles[last].drawn.remote()
        assert 0 < drawn < sampled  # the others' tokens are kept
        assert len({t.token_ids.tobytes() for t in trajectories[:2]}) == 2
        for t in trajectories[:4]:
            check_logprobs(tiny_model, 0.01 * stage.version, t)
        with pytest.raises(UserError, match="is the last rollout worker"):
            await pool.remove(last)
        with pytest.raises(UserError, match="at least 1 worker must stay"):
            await pool.scale(0)
        assert not stage.losses()

    stage.play(scenario)


@torch.no_grad()
def check_logprobs(model: Path, shift: float, trajectory: Any) -> None:
    policy = load_model(model)
    for parameter in policy.parameters():
        parameter.add_(shift)
    tokens = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
    scores = score_tokens(policy, tokens, None)[0][0].numpy()
    mask = trajectory.loss_mask
    np.testing.assert_allclose(trajectory.logprobs[mask], scores[mask], atol=2e-5)


def test_unproved_weights_never_serve_and_an_empty_fleet_says_why(stage: Stage) -> None:
    """The last test of the shared stage: nobody is left after it."""

    def lying_version() -> WeightManifest:
        canary = Canary(((5, 6, 7, 8, 9),), (np.zeros(5, "f4"),))
        return replace(stage.next_version(), canary=canary)

    async def scenario(pool: RolloutPool) -> None:
        await pool.scale(1)
        stage.losses()
        pool._budget = Budget("rollout worker", 1)
        waiting = asyncio.create_task(pool.publish(lying_version()))
        late = asyncio.create_task(stage.ask(1))
        while len([what for _, what, _ in stage.changes if what == "lost"]) < 2:
            await asyncio.sleep(0.05)
        # A newcomer that cannot take the weights is not at fault: others may be on their way.
        stage.losses()
        await pool.publish(stage.next_version())
        await waiting
        [rollout] = await late
        span = (stage.version, stage.version)
        assert all(t.version_span == span for t in rollout.trajectories)
        assert len(pool._budget.reasons) == 1
        why = r"1 restarts allowed; the first was rollout-\d+: SyncError: .*fails its canary"
        pool._config = pool._config.model_copy(update={"stall_s": 0.1})
        with pytest.raises(FleetExhausted, match=why):
            await pool.publish(lying_version())
        with pytest.raises(FleetExhausted):
            await pool.generate(PROMPT, "g", SHORT, 2, 0)

    stage.play(scenario)


def test_a_dealt_step_is_the_same_to_the_bit(ray_cluster: None, tiny_model: Path) -> None:
    """With vLLM, one worker and two, whatever was asked before, and though one is killed."""
    stage = Stage(tiny_model, count=2, backend="vllm", kv_cache_mb=32, max_restarts=0, attempts=3)
    stage.open()
    requests = [
        RolloutRequest(
            Prompt(str(i), (5 + i, 6, 7 + i % 3), "", ""),
            f"0/{i}",
            Sampling(max_tokens=24, seed=100 + i),
            4,
            0,
        )
        for i in range(8)
    ]

    async def bits(pool: RolloutPool, kill: str = "") -> list[tuple[bytes, bytes]]:
        futures = pool.deal(requests)
        if kill:
            await asyncio.sleep(0.3)
            os.kill(await stage.handles[kill].pid.remote(), signal.SIGKILL)
        done = await asyncio.gather(*futures)
        return [(t.token_ids.tobytes(), t.logprobs.tobytes()) for r in done for t in r.trajectories]

    async def scenario(pool: RolloutPool) -> None:
        first = await bits(pool)
        assert len(set(first)) == 32
        await stage.ask(5)
        assert await bits(pool) == first
        for name in pool.names:
            await stage.handles[name].slow_down.remote(0.05)
        assert await bits(pool, kill=pool.names[1]) == first
        assert len(stage.losses()) == len(pool.names) == 1  # nobody may come in its place
        assert await bits(pool) == first  # both shares, one after the other
        await pool.scale(1)
        alone = await bits(pool)
        await stage.ask(3)
        assert await bits(pool) == alone
        assert sorted(tokens for tokens, _ in alone) == sorted(tokens for tokens, _ in first)

    try:
        stage.play(scenario)
    finally:
        stage.close()
