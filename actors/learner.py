"""The learner group: ranks that update the policy together and publish its versions."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from transformers import PreTrainedModel

from actors.weights import Canary, WeightManifest, publish_weights
from raylign.algorithms.catalog import Algorithm, find_algorithm, resolve_coefficients
from raylign.algorithms.policy import Coefficients
from raylign.config import AlgorithmConfig, AlignConfig
from raylign.models.assembly import ModelPlan
from raylign.models.loading import load_model, load_tokenizer, save_model
from raylign.records import Trajectory, collate
from raylign.tracking import Metric, merge
from raylign.training.balance import plan_micro_batches
from raylign.training.engine import build_engine
from raylign.training.policy import PolicyLearner

CANARY_SEQUENCES = 4


@dataclass(frozen=True, slots=True, eq=False)
class LearnerTask:
    """One rank's rows of a step: trajectories, their advantages and loss weights, and how to split
    them into micro-batches (lists of indices into these rows; every rank has as many)."""

    trajectories: tuple[Trajectory, ...]
    advantages: tuple[float, ...]
    weights: tuple[float, ...]
    micro_batches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class LearnerReport:
    """What one update measured."""

    metrics: dict[str, Metric]
    mismatch_max: float
    start: float
    end: float


def resolve_algorithm(config: AlgorithmConfig) -> tuple[Algorithm, Coefficients]:
    """The catalog row, and its coefficients with the user's in place of the authors'.

    Raises `ValueError` for an unknown name, and for a key that has no effect with the algorithm.
    """
    algorithm = find_algorithm(config.name)
    given = {
        key: getattr(config, key)
        for key in Coefficients.__slots__
        if getattr(config, key, None) is not None and key not in ("beta", "importance")
    }
    said = config.model_fields_set
    if "beta" in said or algorithm.pairwise:
        given["beta"] = config.beta
    if "value" in said and not algorithm.needs_values:
        raise ValueError(f"value has no effect with {algorithm.name}; leave it out")
    if algorithm.needs_values:
        value = config.value
        given |= {"gamma": value.gamma, "lam": value.lam}
        given |= {"value_clip": value.clip, "value_coef": value.coef}
    if "importance" in said:
        chosen = config.importance.model_dump(exclude_unset=True)
        given["importance"] = replace(algorithm.coefficients.importance, **chosen)
    if config.dynamic_sampling is not None:
        algorithm = replace(algorithm, dynamic_sampling=config.dynamic_sampling)
    coefficients = resolve_coefficients(algorithm, given)
    if "kl_horizon" in said and config.kl_target is None:
        raise ValueError("kl_horizon has no effect without kl_target; leave it out")
    if config.kl_target is not None and coefficients.kl_coef == 0:
        raise ValueError("kl_target adapts kl_coef, which is 0; give kl_coef")
    return algorithm, coefficients


class LearnerWorker:
    """One rank of the learner behind a Ray actor."""

    def __init__(
        self, rank: int, world_size: int, model: Path, config: AlignConfig, seed: int = 0
    ) -> None:
        """seed: of a new adapter's weights, the same on every rank."""
        self._rank, self._world_size = rank, world_size
        self._model, self._config, self._seed = model, config, seed

    def address(self) -> str:
        """Where rank 0 waits for the others."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, address: str) -> None:
        """Join the process group and build the engine. All ranks at once."""
        config = self._config
        torch.set_num_threads(config.learner.threads)
        on_gpu = config.learner.gpus > 0
        # DeepSpeed wants what a launcher would set; Ray shows each rank its own GPU as number 0.
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(self._world_size), LOCAL_RANK="0")
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=address,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=config.engine.timeout_s),
        )
        self._tokenizer = load_tokenizer(self._model)
        policy = self._build_policy()
        algorithm, coefficients = resolve_algorithm(config.algorithm)
        history = config.max_staleness if config.mismatch_sample else -1
        adapted = config.peft != "none"
        plain = None
        if not adapted or history >= 0:
            plain = load_model(self._model, config.engine.dtype)
        self._learner = PolicyLearner(
            build_engine(config.engine, policy, config.optimizer),
            None if adapted else plain,
            algorithm,
            coefficients,
            temperature=config.sampling.temperature or 1.0,
            history=history,
            scratch=plain if adapted else None,
        )
        self._architecture = policy.config

    def _build_policy(self) -> PreTrainedModel:
        """The model in training; with an adapter, if it is that which is trained."""
        config = self._config
        if config.peft == "none":
            return load_model(self._model, config.engine.dtype)
        return ModelPlan(
            self._model,
            self._seed,
            peft=config.peft,
            adapter=config.adapter,
            dtype=config.engine.dtype,
        ).build()

    def update(self, task: LearnerTask, lr: float) -> LearnerReport:
        """Update on this rank's rows. All ranks at once."""
        start = time.time()
        pad = self._tokenizer.pad_token_id
        mismatch, largest = self._measure_mismatch(task, pad)
        batches = [
            collate(
                [task.trajectories[i] for i in rows],
                [task.advantages[i] for i in rows],
                [task.weights[i] for i in rows],
                pad,
            )
            if rows
            else None
            for rows in task.micro_batches
        ]
        metrics = self._learner.update(batches, lr, self._config.algorithm.updates_per_batch)
        return LearnerReport(metrics | mismatch, largest, start, time.time())

    def _measure_mismatch(self, task: LearnerTask, pad: int) -> tuple[dict[str, Metric], float]:
        share = -(-self._config.mismatch_sample // self._world_size)
        chosen = [t for t in task.trajectories[:share] if t.sampled_tokens]
        if not chosen:
            return {}, 0.0
        return self._learner.measure_mismatch(
            collate(chosen, np.zeros(len(chosen)), np.zeros(len(chosen)), pad)
        )

    def publish(self, sequences: Sequence[tuple[int, ...]]) -> WeightManifest | None:
        """Rank 0's manifest of the current version, with `sequences` as canary. All ranks."""
        scores = self._learner.score_canary(sequences)
        if self._rank:
            return None
        canary = Canary(tuple(sequences), scores)
        return publish_weights(self._learner.version, self._learner.weights, canary)

    def save(self, directory: Path) -> None:
        """Rank 0 writes the policy as a Hugging Face directory."""
        if self._rank == 0:
            save_model(self._learner.weights, self._architecture, self._tokenizer, directory)


class LearnerGroup:
    """All ranks, addressed as one. The policy version advances here and nowhere else."""

    def __init__(self, workers: Sequence[ActorHandle], config: AlignConfig) -> None:
        self._workers, self._config = list(workers), config
        self._canary: tuple[tuple[int, ...], ...] = ()

    async def start(self, canary: Sequence[tuple[int, ...]]) -> WeightManifest:
        """Join the ranks and publish version 0. `canary`: sequences to prove syncs with."""
        self._canary = tuple(canary[:CANARY_SEQUENCES])
        address = await self._workers[0].address.remote()
        await self._all("start", address)
        return await self.publish()

    async def update(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float],
        weights: Sequence[float],
        lr: float,
    ) -> LearnerReport:
        """One policy update on the whole batch, split over ranks and micro-batches by tokens."""
        tasks = self._deal(trajectories, advantages, weights)
        reports: list[LearnerReport] = await asyncio.gather(
            *(w.update.remote(task, lr) for w, task in zip(self._workers, tasks, strict=True))
        )
        return LearnerReport(
            metrics=merge(report.metrics for report in reports),
            mismatch_max=max(report.mismatch_max for report in reports),
            start=min(report.start for report in reports),
            end=max(report.end for report in reports),
        )

    async def publish(self) -> WeightManifest:
        """The current version, ready to be pulled."""
        manifests = await self._all("publish", self._canary)
        return manifests[0]

    async def save(self, directory: Path) -> None:
        """Write the current policy as a Hugging Face directory."""
        await self._all("save", directory)

    def stop(self) -> None:
        """Kill all ranks."""
        for worker in self._workers:
            ray.kill(worker)

    def _deal(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float],
        weights: Sequence[float],
    ) -> list[LearnerTask]:
        lengths = [len(t.token_ids) for t in trajectories]
        plans = plan_micro_batches(lengths, len(self._workers), self._config.learner.token_budget)
        tasks = []
        for plan in plans:
            rows = sorted(row for group in plan for row in group)
            local = {row: index for index, row in enumerate(rows)}
            tasks.append(
                LearnerTask(
                    trajectories=tuple(trajectories[row] for row in rows),
                    advantages=tuple(advantages[row] for row in rows),
                    weights=tuple(weights[row] for row in rows),
                    micro_batches=tuple(tuple(local[row] for row in group) for group in plan),
                )
            )
        return tasks

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await asyncio.gather(
            *(getattr(worker, method).remote(*arguments) for worker in self._workers)
        )


def spawn_learner_workers(
    options: Mapping[str, Any], model: Path, config: AlignConfig, seed: int = 0
) -> list[ActorHandle]:
    """Start every rank's actor with the given Ray resources."""
    actor = ray.remote(LearnerWorker).options(**options)
    return [
        actor.remote(r, config.learner.count, model, config, seed)
        for r in range(config.learner.count)
    ]
