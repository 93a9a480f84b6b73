"""One rank of the learner behind a Ray actor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch

from actors.broadcast import Broadcast, Loss
from actors.processes import Process, describe_process
from actors.transports import Transport
from actors.weights import (
    AdapterSpec,
    Canary,
    WeightManifest,
    build_transport,
    publish_weights,
)
from raylign.algorithms.catalog import (
    Algorithm,
    find_algorithm,
    needs_reference,
    resolve_coefficients,
)
from raylign.algorithms.policy import Coefficients
from raylign.config import AlgorithmConfig, AlignConfig
from raylign.models.adapters import find_adaptation
from raylign.models.assembly import ModelPlan
from raylign.models.loading import load_model, load_tokenizer, pad_id
from raylign.records import Trajectory
from raylign.training.checkpoints import Event
from raylign.training.critic import Critic, build_critic
from raylign.training.engine import build_engine
from raylign.training.export import export_stage
from raylign.training.learner_state import LearnerState, StatePlan, identify
from raylign.training.minibatches import Share
from raylign.training.policy import Divergence, Learned, Method, PolicyLearner, Rates, Whole
from raylign.training.policy_scores import PolicyScores
from raylign.training.publication import send_beside, stream_adapter, stream_weights

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class LearnerTask:
    """One rank's part of a step: its own trajectories, which rows of the batch they are and how
    they are split, and what every rank is told of the whole batch."""

    trajectories: tuple[Trajectory, ...]
    share: Share
    whole: Whole
    rates: Rates


@dataclass(frozen=True, slots=True, eq=False)
class RankReport:
    """What a rank measured, and when."""

    learned: Learned
    start: float
    end: float
    lost: tuple[Loss, ...] = ()
    """Workers that a broadcast of weights went on without, since the last report."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """A step that no rank has taken."""

    reason: str
    rows: tuple[int, ...]
    """Of the batch, that it was made of."""


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
    """One rank. Calls go to all ranks at once, but for `place` and `ping`."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        model: Path,
        config: AlignConfig,
        seed: int = 0,
        transport: str = "object_store",
    ) -> None:
        """seed: of new weights, such as an adapter's, the same on every rank. transport: that
        weights are published through; see `actors.transports.choose_transport`."""
        self._rank, self._world_size = rank, world_size
        self._model, self._config, self._seed = model, config, seed
        self._transport_name = transport
        self._transport: Transport | None = None

    def place(self) -> tuple[Process, str]:
        """This process, and where others would find it if it is the first rank."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            address = f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
        return describe_process(), address

    @ray.method(concurrency_group="health")
    def ping(self) -> None:
        """Answered by another thread than the one that learns."""

    def start(
        self, address: str, checkpoint: Path | None = None, version: int | None = None
    ) -> int:
        """Join the process group and build the engines; go on from a checkpoint, as another
        `version` if one is given. The version."""
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
        if self._rank == 0:
            self._transport = build_transport(
                self._transport_name,
                host=ray.util.get_node_ip_address(),
                on_card=on_gpu,
                deadline_s=config.transfer.deadline_s,
            )
        self._build()
        if checkpoint is not None:
            self._state.restore(checkpoint)
        if version is not None:
            self._learner.restore(version)
        return self._learner.version

    def _build(self) -> None:
        config, dtype = self._config, self._config.engine.dtype
        algorithm, coefficients = resolve_algorithm(config.algorithm)
        lm = ModelPlan(
            self._model, self._seed, peft=config.peft, adapter=config.adapter, dtype=dtype
        ).build()
        values = None
        if algorithm.needs_values:
            values = build_critic(config.critic.model or self._model, self._model, self._seed)
        identity = identify(lm, values, self._tokenizer, dtype)
        engine = build_engine(config.engine, lm, config.optimizer)
        critic = None
        if values is not None:
            own = build_engine(config.engine, values, config.critic.optimizer)
            critic = Critic(own, config.critic.warmup_steps)
        adapted = config.peft != "none"
        history = config.max_staleness if config.mismatch_sample else 0
        referred = needs_reference(algorithm, coefficients) and not adapted
        scores = PolicyScores(
            engine,
            load_model(self._model, dtype) if referred else None,
            load_model(self._model, dtype) if history and not referred else None,
            temperature=config.sampling.temperature or 1.0,
            history=history,
        )
        method = Method(
            algorithm,
            coefficients,
            temperature=config.sampling.temperature or 1.0,
            max_tokens=config.longest,
            sample=config.mismatch_sample,
        )
        self._learner = PolicyLearner(engine, method, scores, critic, pad_id(self._tokenizer))
        plan = StatePlan(identity, config.checkpoints, dtype, config.learner.deadline_s)
        self._state = LearnerState(self._learner, self._tokenizer, plan)

    def update(self, task: LearnerTask) -> RankReport | Diverged:
        """Learn from this rank's rows."""
        start = time.time()
        try:
            learned = self._learner.update(task.trajectories, task.share, task.whole, task.rates)
        except Divergence as error:
            return Diverged(error.reason, error.rows)
        sender = self._transport
        lost = sender.take_losses() if isinstance(sender, Broadcast) else ()
        return RankReport(learned, start, time.time(), lost)

    def publish(self, sequences: Sequence[tuple[int, ...]]) -> WeightManifest | None:
        """The first rank's manifest of the current version, with `sequences` as canary."""
        learner, config = self._learner, self._config
        canary = Canary(tuple(sequences), learner.scores.canary(sequences))
        size = config.transfer.bucket_mb * MEBIBYTE
        adapter = _describe_adapter(learner) if config.transfer.adapter_only else None
        stream = stream_adapter if adapter else stream_weights
        buckets = stream(learner.engine, size)
        if self._rank:
            for _ in buckets:  # the first rank cannot gather without the others
                pass
            return None

        def send(tensors: Iterator[tuple[str, torch.Tensor]]) -> WeightManifest:
            return publish_weights(
                learner.version, tensors, canary, self._transport, limit=size, adapter=adapter
            )

        return send_beside(buckets, send)

    def save(self, root: Path, progress: dict[str, Any]) -> list[Event]:
        """A checkpoint of the current version in `root`; what became of saves since last time."""
        self._state.save(root, progress)
        return self._state.take_events()

    def settle(self) -> list[Event]:
        """Wait for a save in flight; what became of saves since last time."""
        self._state.finish()
        return self._state.take_events()

    def export(self, output: Path) -> dict[str, Any]:
        """`model/` and, of an adapted policy, `adapter/` in `output`, as training stages leave
        them; what the summary says of it."""
        return export_stage(self._learner.engine, self._tokenizer, output)


def _describe_adapter(learner: PolicyLearner) -> AdapterSpec:
    adaptation = find_adaptation(learner.engine.lm)
    assert adaptation is not None
    form = adaptation.form
    # rank-stabilised LoRA divides by the root of the rank.
    alpha = form.lora_alpha * (form.r**0.5 if form.use_rslora else 1.0)
    return AdapterSpec(form.r, float(alpha), tuple(sorted(form.target_modules)))
