"""One rank of learners that save and go on: `learner_rank.py DIR MODEL RANK WORLD PORT`.

A script, because ranks are processes. The first rank writes what each case left to DIR.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learning import TORCH, learn, make_learner, make_trajectories, weights_of

from raylign.config import CheckpointConfig, EngineConfig, UserError
from raylign.models.loading import load_tokenizer
from raylign.training.checkpoints import list_checkpoints
from raylign.training.learner_state import LearnerState, StatePlan
from raylign.training.policy import PolicyLearner
from raylign.training.publication import send_beside, stream_adapter, stream_weights

ZERO1, ZERO3 = EngineConfig(zero_stage=1), EngineConfig(zero_stage=3)


@dataclass(frozen=True)
class Case:
    """A way of learning from the same batches."""

    engine: EngineConfig
    algorithm: str = "grpo"
    peft: str = "none"
    passes: int = 1
    minibatches: int = 1
    resumes: bool = True


CASES = {
    "torch-ppo": Case(TORCH, "ppo", passes=2, minibatches=2),
    "zero1-ppo": Case(ZERO1, "ppo", passes=2, minibatches=2),
    "zero1-lora": Case(ZERO1, "rloo", peft="lora", passes=2),
    "zero3-ppo": Case(ZERO3, "ppo", passes=2, minibatches=2),
    "zero3-lora": Case(ZERO3, "online_dpo", peft="lora", resumes=False),
}
BEFORE, AFTER = 2, 2


class Runner:
    """Updates of one case on this rank."""

    def __init__(self, case: Case, model: Path, rank: int, world: int) -> None:
        self._case, self._rank, self._world = case, rank, world
        self._tokenizer = load_tokenizer(model)
        self._trajectories = make_trajectories(model)
        self.learner = make_learner(
            model, case.algorithm, engine=case.engine, peft=case.peft, sample=3
        )
        critic = self.learner.critic
        identity: dict[str, Any] = {"case": case.algorithm, "critic": critic is not None}
        plan = StatePlan(identity, CheckpointConfig(keep=1), "float32", 60.0)
        self.state = LearnerState(self.learner, self._tokenizer, plan)

    def run(self, updates: int) -> dict[str, Any]:
        """What the last update told, metrics of all ranks added up."""
        for _ in range(updates):
            learned = learn(
                self.learner,
                self._trajectories,
                rank=self._rank,
                ranks=self._world,
                budget=40,
                passes=self._case.passes,
                minibatches=self._case.minibatches,
            )
        box: list[Any] = [None] * self._world
        dist.all_gather_object(box, (learned.metrics, learned.advantages))
        return {"metrics": [each[0] for each in box], "advantages": [each[1] for each in box]}


def collect(learner: PolicyLearner) -> dict[str, Any]:
    """All weights, whole, on the first rank."""
    found = {"policy": weights_of(learner)}
    if learner.critic is not None:
        found["critic"] = {n: t.clone() for n, t in learner.critic.engine.weights().items()}
    return found


def run_case(case: Case, directory: Path, model: Path, rank: int, world: int) -> dict[str, Any]:
    whole = Runner(case, model, rank, world)
    whole.run(BEFORE)
    if case.resumes:
        whole.state.save(directory, {"note": "half way"})
    found = whole.run(AFTER) | {"whole": collect(whole.learner)}
    buckets = list(stream_weights(whole.learner.engine, 20_000))
    found["streamed"] = {name: t.clone() for bucket in buckets for name, t in bucket}
    found["buckets"] = [sum(t.nbytes for _, t in bucket) for bucket in buckets]
    if case.peft != "none":
        adapter = stream_adapter(whole.learner.engine, 1_000_000)
        if rank == 0:
            found["adapter"] = send_beside(adapter, dict)
        else:
            list(adapter)
    if not case.resumes:
        return found
    whole.state.finish()
    found["events"] = whole.state.take_events()
    [checkpoint] = list_checkpoints(directory)
    again = Runner(case, model, rank, world)
    found["progress"] = again.state.restore(checkpoint)
    found["version"] = again.learner.version
    again.run(AFTER)
    return found | {"resumed": collect(again.learner)}


def refuse(directory: Path, model: Path, rank: int, world: int) -> str:
    """A checkpoint of another learner."""
    [checkpoint] = list_checkpoints(directory)
    runner = Runner(Case(TORCH), model, rank, world)
    try:
        runner.state.restore(checkpoint)
    except UserError as error:
        return str(error)
    return ""


def main(directory: Path, model: Path, rank: int, world: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=90),
    )
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = run_case(case, directory / name, model, rank, world)
    results["refusal"] = refuse(directory / "torch-ppo", model, rank, world)
    if rank == 0:
        torch.save(results, directory / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
