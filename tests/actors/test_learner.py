"""The learner group under real Ray: what it learns, whom it blames, and that it goes on exactly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from learning import make_trajectories

from actors.learner import LearnerGroup, Step, spawn_learner_worker
from actors.ranks import LearnerLost
from actors.weights import AdapterSpec, WeightManifest, receive_weights
from raylign.config import AlignConfig
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.runtime import worker_env
from raylign.training.batches import read_batch
from raylign.training.checkpoints import find_newest
from raylign.training.engine import DivergenceError
from raylign.training.heartbeat import read_birth

pytestmark = pytest.mark.slow
CANARY = [(5, 6, 7, 8), (9, 10, 11)]
TIMEOUT_S = 8.0


def make_config(**changes: Any) -> AlignConfig:
    given: dict[str, Any] = {
        "algorithm": {"name": "ppo", "updates_per_batch": 2, "minibatches": 2},
        "learner": {"count": 2, "cpus": 0.2, "token_budget": 64, "deadline_s": 60.0},
        "engine": {"backend": "torch", "timeout_s": TIMEOUT_S},
        "max_staleness": 2,
        "steps": 10,
        "group_size": 2,
        "mismatch_sample": 3,
        "checkpoints": {"asynchronous": False},
    }
    return AlignConfig.model_validate(given | changes)


def make_group(model: Path, config: AlignConfig, kept: Path) -> LearnerGroup:
    options = {
        "num_cpus": 0.2,
        "runtime_env": {"env_vars": worker_env() | {"OMP_NUM_THREADS": "1"}},
    }
    given = {"options": options, "model": model, "config": config}
    spawn = partial(spawn_learner_worker, **given, seed=3, transport="broadcast")
    return LearnerGroup(config, spawn, seed=7, kept=kept)


def make_step(model: Path, version: int) -> Step:
    """Of every version another batch."""
    rows = make_trajectories(model, [8 + version, 7, 9, 12, 5, 16])
    return Step(tuple(rows), tuple(int(t.group_id) for t in rows), 1e-3, 2e-3)


def play(group: LearnerGroup, scenario: Callable[[LearnerGroup], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        try:
            return await scenario(group)
        finally:
            group.stop()

    return asyncio.run(whole())


def read(manifest: WeightManifest) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in receive_weights(manifest)}


@pytest.fixture(scope="module")
def found(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of a group that learned, was killed, started again from its checkpoint, and hung.
    One story, because ranks take seconds to start."""
    directory = tmp_path_factory.mktemp("group")
    steps = [make_step(tiny_model, version) for version in range(3)]
    found: dict[str, Any] = {"directory": directory}

    async def scenario(group: LearnerGroup) -> None:
        manifest = await group.start(CANARY)
        found["start"], found["canary"] = read(manifest), manifest.canary
        quits = receive_weights(manifest, "quitter")
        next(quits)
        quits.close()
        found["report"] = await group.update(steps[0])
        found["events"] = await group.save(directory / "checkpoints", {"data": [1, 2]})
        await group.update(steps[1])
        found["last report"] = await group.update(steps[2])
        found["whole"] = read(await group.publish())
        with pytest.raises(ValueError, match="1 of 6 rewards are not finite"):
            await group.update(spoil(steps[0], reward=float("inf")))
        with pytest.raises(DivergenceError) as caught:
            await group.update(spoil(steps[0], logprobs=np.full(9, np.nan, np.float32)))
        found["diverged"] = str(caught.value), group.version
        found["died"] = await lose(group, steps[0], 1, signal.SIGKILL)
        newest, _ = find_newest(directory / "checkpoints")
        assert newest is not None
        manifest = await group.restart(newest[0])
        found["restored"] = group.version, manifest.version, newest[1].progress
        for step in steps[1:]:
            await group.update(step)
        found["again"] = read(await group.publish())
        await group.export(directory)
        found["hung"] = await lose(group, steps[0], 0, signal.SIGSTOP)
        found["processes"] = list(group.processes.values())

    play(make_group(tiny_model, make_config(), directory / "kept"), scenario)
    return found


def spoil(step: Step, **changes: Any) -> Step:
    rows = [replace(t, **changes) if i == 2 else t for i, t in enumerate(step.trajectories)]
    return replace(step, trajectories=tuple(rows))


def test_version_0_is_what_it_began_with(found: dict[str, Any], tiny_model: Path) -> None:
    start = dict(load_model(tiny_model).named_parameters())
    assert all(torch.equal(found["start"][n], p) for n, p in start.items())
    with torch.no_grad():
        own = score_tokens(load_model(tiny_model), torch.tensor([list(CANARY[0])]))[0][0].numpy()
    assert np.allclose(found["canary"].logprobs[0], own, atol=1e-5)


def test_a_report_adds_up_what_ranks_measured(found: dict[str, Any]) -> None:
    report = found["report"]
    metrics = report.metrics
    assert metrics["grad_norm"].count == metrics["value/grad_norm"].count == 4
    assert metrics["mismatch/mean_abs"].mean < 1e-5 and report.mismatch_max < 1e-4
    assert metrics["value/explained_variance"].count == 1
    assert report.gaps.keys() == {0, 1, 2} and len(report.gaps[1]) == 7
    assert np.isnan(report.gaps[1][:3]).all() and not np.isnan(report.gaps[1][3:]).any()
    assert len(report.advantages) == 6 and report.advantages[5] > report.advantages[0]
    assert report.end > report.start
    assert [(one.worker, one.version, one.reason) for one in report.lost] == [
        ("quitter", 0, "its connection closed")
    ]
    assert found["last report"].lost == ()
    # At version 2, samples of version 0 are compared with what that was.
    late = found["last report"].metrics
    assert late["mismatch/unchecked"].total == 0 and late["mismatch/mean_abs"].mean < 1e-5


def test_a_rank_that_dies_is_named_at_once(found: dict[str, Any]) -> None:
    error, seconds = found["died"]
    assert error.rank == 1 and seconds < TIMEOUT_S
    assert "learner rank 1 died" in str(error)


def test_a_rank_that_is_stopped_is_named_within_its_patience(found: dict[str, Any]) -> None:
    error, seconds = found["hung"]
    assert error.rank == 0 and seconds < 2 * TIMEOUT_S + 5
    assert "does not answer" in str(error) or "hangs" in str(error)


def test_no_process_is_left_behind(found: dict[str, Any]) -> None:
    """Least of all the stopped one, which Ray cannot ask to leave."""
    deadline = time.monotonic() + 10
    while left := [p.pid for p in found["processes"] if read_birth(p.pid) == p.born]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_restarted_group_goes_on_to_the_bit(found: dict[str, Any]) -> None:
    assert found["restored"] == (1, 1, {"data": [1, 2]})
    assert [event["what"] for event in found["events"]] == ["checkpoint"]
    assert all(torch.equal(found["again"][n], t) for n, t in found["whole"].items())
    exported = dict(load_model(found["directory"] / "model").named_parameters())
    assert all(torch.equal(found["whole"][n], p) for n, p in exported.items())


def test_a_gradient_that_is_no_number_is_told_and_kept(found: dict[str, Any]) -> None:
    place = found["directory"] / "kept/step-00000003"
    said, version = found["diverged"]
    assert said.endswith(f"nan; its rows are in {place}") and version == 3
    first, *lines = map(json.loads, (place / "rows.jsonl").open())
    assert first["step"] == 3 and "policy at version 3" in first["reason"]
    assert {2, 3} <= {line["row"] for line in lines} and len(lines) < 6
    [file] = place.glob("*.safetensors")
    batch = read_batch(file)
    assert batch is not None and batch.settings == {"lr": 1e-3, "critic_lr": 2e-3}
    assert np.isnan(batch.trajectories[2].logprobs).all()


async def lose(
    group: LearnerGroup, step: Step, rank: int, sign: signal.Signals
) -> tuple[LearnerLost, float]:
    """What is said, and after how many seconds, when a rank gets a signal."""
    os.kill(group.processes[rank].pid, sign)
    started = time.monotonic()
    with pytest.raises(LearnerLost) as caught:
        while True:  # it may take a moment to die
            await group.update(step)
    return caught.value, time.monotonic() - started


def test_an_adapter_is_learned_published_and_saved_alone(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """One rank, pairs, asynchronous checkpoints; and a version of one's own choice."""
    config = make_config(
        algorithm={"name": "online_dpo"},
        peft="lora",
        adapter={"rank": 4},
        transfer={"adapter_only": True},
        learner={"count": 1, "cpus": 0.2, "token_budget": 64},
        checkpoints={"asynchronous": True},
    )
    step = make_step(tiny_model, 0)

    async def scenario(group: LearnerGroup) -> Any:
        first = await group.start(CANARY, version=5)
        report = await group.update(step)
        assert await group.save(tmp_path / "checkpoints", {}) == []  # it goes on beside
        events = await group.settle()
        last = await group.publish()
        await group.export(tmp_path)
        return first, last, (read(first), read(last)), report, events

    first, last, (before, after), report, events = play(
        make_group(tiny_model, config, tmp_path), scenario
    )
    assert (first.version, last.version) == (5, 6)
    assert first.adapter == last.adapter == AdapterSpec(4, 8.0, first.adapter.targets)
    assert {"q_proj", "down_proj"} <= set(first.adapter.targets)
    assert all(".lora_A." in name or ".lora_B." in name for name in after)
    assert not all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert report.metrics["rewards/margin"].count == 3
    assert [event["what"] for event in events] == ["checkpoint"]
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in after.items())
    assert saved.keys() == after.keys()
    assert (tmp_path / "checkpoints/step-00000006/hf/adapter_config.json").is_file()
    assert load_model(tmp_path / "model").num_parameters() > 0
