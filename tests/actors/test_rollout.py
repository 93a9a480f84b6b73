"""The pool under real Ray: only fresh workers serve, lost work is made again, the hung replaced."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.rollout import RolloutPool, RolloutWorker
from actors.supervision import BudgetSpent
from actors.weights import Canary, SyncProof, WeightManifest, publish_weights
from raylign.config import RolloutConfig
from raylign.inference.generator import Sampling
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.records import Prompt

pytestmark = pytest.mark.slow
PROMPT = Prompt("p", (5, 6, 7), "w1 w2 w3", "")
SAMPLING = Sampling(max_tokens=8)


class PidWorker(RolloutWorker):
    """A rollout worker that says which process it is."""

    def pid(self) -> int:
        return os.getpid()


def make_pool(
    model: Path, proofs: list[tuple[str, SyncProof]], **changes: Any
) -> tuple[RolloutPool, dict[str, Any]]:
    config = RolloutConfig(
        backend="transformers", cpus=0.2, **({"deadline_s": 60.0, "max_restarts": 2} | changes)
    )
    handles: dict[str, Any] = {}

    def spawn(name: str) -> Any:
        actor = ray.remote(PidWorker).options(num_cpus=0.2, max_concurrency=16)
        handles[name] = actor.remote(name, model, config, 64, 0)
        return handles[name]

    return RolloutPool(config, spawn, lambda name, proof: proofs.append((name, proof))), handles


def manifest_of(model: Path, version: int, shift: float = 0.0) -> WeightManifest:
    """The tiny model with every weight moved by `shift`, published with an honest canary."""
    policy = load_model(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(shift)
        sequence = (5, 6, 7, 8, 9)
        scores = score_tokens(policy, torch.tensor([list(sequence)]))[0][0].numpy()
    weights = {name: p.detach() for name, p in policy.named_parameters()}
    return publish_weights(version, weights, Canary((sequence,), (scores,)))


def play(scenario: Callable[[RolloutPool], Any], pool: RolloutPool) -> Any:
    async def whole() -> Any:
        try:
            return await scenario(pool)
        finally:
            pool.stop()

    return asyncio.run(whole())


def test_workers_prove_versions_and_come_and_go(ray_cluster: None, tiny_model: Path) -> None:
    proofs: list[tuple[str, SyncProof]] = []
    pool, _ = make_pool(tiny_model, proofs, count=1)

    async def scenario(pool: RolloutPool) -> None:
        await pool.start(manifest_of(tiny_model, 0))
        late = asyncio.create_task(pool.generate(PROMPT, "g", SAMPLING, 2, oldest=1))
        await asyncio.sleep(0.5)
        assert not late.done()  # nobody has version 1 yet
        await pool.publish(manifest_of(tiny_model, 1, shift=0.01))
        assert all(t.version_span == (1, 1) for t in (await late).trajectories)
        work = [
            asyncio.create_task(pool.generate(PROMPT, str(i), SAMPLING, 2, oldest=1))
            for i in range(12)
        ]
        assert await pool.add() == "rollout-1"
        await pool.remove("rollout-0")
        assert pool.names == ["rollout-1"]
        after = await pool.generate(PROMPT, "last", SAMPLING, 2, oldest=1)
        assert after.worker == "rollout-1" and after.trajectories[0].version_span == (1, 1)
        assert [len(r.trajectories) for r in await asyncio.gather(*work)] == [2] * 12

    play(scenario, pool)
    assert [(name, proof.version) for name, proof in proofs] == [
        ("rollout-0", 0),
        ("rollout-0", 1),
        ("rollout-1", 1),  # the newcomer takes the current version at once
    ]
    assert all(proof.canary_error < 1e-4 for _, proof in proofs)


def test_a_killed_workers_groups_are_made_again(ray_cluster: None, tiny_model: Path) -> None:
    pool, handles = make_pool(tiny_model, [], count=2)

    async def scenario(pool: RolloutPool) -> None:
        await pool.start(manifest_of(tiny_model, 0))
        pid = await handles["rollout-0"].pid.remote()
        work = [
            asyncio.create_task(pool.generate(PROMPT, str(i), SAMPLING, 2, oldest=0))
            for i in range(16)
        ]
        await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        done = await asyncio.gather(*work)
        assert [len(r.trajectories) for r in done] == [2] * 16
        again = await pool.generate(PROMPT, "again", SAMPLING, 2, oldest=0)
        assert len(again.trajectories) == 2

    play(scenario, pool)


def test_a_hung_worker_is_replaced_within_its_deadline(ray_cluster: None, tiny_model: Path) -> None:
    pool, handles = make_pool(tiny_model, [], count=1, deadline_s=5.0)

    async def scenario(pool: RolloutPool) -> None:
        await pool.start(manifest_of(tiny_model, 0))
        os.kill(await handles["rollout-0"].pid.remote(), signal.SIGSTOP)
        rollout = await pool.generate(PROMPT, "g", SAMPLING, 2, oldest=0)
        assert len(rollout.trajectories) == 2 and rollout.worker != "rollout-0"

    play(scenario, pool)


def test_giving_up_names_the_first_failure(ray_cluster: None, tiny_model: Path) -> None:
    pool, handles = make_pool(tiny_model, [], count=1, max_restarts=0)

    async def scenario(pool: RolloutPool) -> None:
        await pool.start(manifest_of(tiny_model, 0))
        os.kill(await handles["rollout-0"].pid.remote(), signal.SIGKILL)
        await pool.generate(PROMPT, "g", SAMPLING, 2, oldest=0)

    with pytest.raises(BudgetSpent, match="0 restarts allowed; the first was rollout-0"):
        play(scenario, pool)


def test_unproved_weights_never_serve(ray_cluster: None, tiny_model: Path) -> None:
    pool, _ = make_pool(tiny_model, [], count=1)
    honest = manifest_of(tiny_model, 0)
    lying = WeightManifest(1, honest.buckets, manifest_of(tiny_model, 1, shift=0.3).canary)

    async def scenario(pool: RolloutPool) -> None:
        await pool.start(honest)
        await pool.publish(lying)

    with pytest.raises(ray.exceptions.RayTaskError, match="fails its canary"):
        play(scenario, pool)
