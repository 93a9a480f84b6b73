"""Who sits where: Ray resources of every actor of a run, decided and checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from actors.transports import choose_transport
from raylign.config import AlignConfig, RewardConfig, RolloutConfig, UserError
from raylign.runtime import worker_env

# Not inside what a trial of a search has reserved for itself.
_ANYWHERE: dict[str, Any] = {"scheduling_strategy": "DEFAULT"}


@dataclass(frozen=True, slots=True)
class Placement:
    """Options of `ray.remote(...).options(**...)` by role."""

    rollout: dict[str, Any]
    reward: dict[str, Any]
    learner: dict[str, Any]
    judge: dict[str, Any]


def place(config: AlignConfig) -> Placement:
    """Options for every role.

    Raises `UserError` when the cluster is too small: Ray would wait for resources without end.
    """
    judges = config.judge.rollout
    judged = judges.count if config.judge.model is not None else 0
    wanted = count_resources(config)
    present = ray.cluster_resources()
    for kind, amount in wanted.items():
        if amount > present.get(kind, 0.0) + 1e-9:
            raise UserError(
                f"align needs {amount:g} {kind} ({config.rollout.count} rollout, "
                f"{config.reward.count} reward and {config.learner.count} learner workers"
                f"{f', {judged} judges' if judged else ''}), the "
                f"cluster has {present.get(kind, 0.0):g}; lower align.*.{kind.lower()}s or counts"
            )
    return Placement(
        rollout=place_rollout(config.rollout),
        reward=place_reward(config.reward),
        learner={
            **_ANYWHERE,
            "num_cpus": config.learner.cpus,
            "num_gpus": config.learner.gpus,
            "runtime_env": _threads(config.learner.threads, config.learner.gpus),
        },
        judge=place_rollout(judges),
    )


def count_resources(config: AlignConfig) -> dict[str, float]:
    """CPUs and GPUs that all actors of a run take."""
    judges = config.judge.rollout
    judged = judges.count if config.judge.model is not None else 0
    return {
        "CPU": config.rollout.count * config.rollout.cpus
        + config.reward.count * config.reward.cpus
        + config.learner.count * config.learner.cpus
        + judged * judges.cpus,
        "GPU": config.rollout.count * config.rollout.gpus
        + config.reward.count * config.reward.gpus
        + config.learner.count * config.learner.gpus
        + judged * judges.gpus,
    }


def choose_route(config: AlignConfig) -> str:
    """How weights travel, from where learner and workers sit. Raises `UserError`."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    shared = config.learner.gpus + config.rollout.gpus <= 1 and config.learner.count == 1
    return choose_transport(
        config.transfer.transport,
        learner_on_card=config.learner.gpus > 0,
        workers_on_cards=config.rollout.gpus > 0,
        same_card=shared and config.learner.gpus > 0 and config.rollout.gpus > 0,
        one_machine=len(nodes) == 1,
    )


def place_reward(config: RewardConfig) -> dict[str, Any]:
    """Options of a worker that scores."""
    return {
        **_ANYWHERE,
        "num_cpus": config.cpus,
        "num_gpus": config.gpus,
        "runtime_env": _threads(config.threads, config.gpus),
    }


def place_rollout(config: RolloutConfig) -> dict[str, Any]:
    """Options of a worker that generates."""
    return {
        **_ANYWHERE,
        "num_cpus": config.cpus,
        "num_gpus": config.gpus,
        # A pulse waits for news; requests, withdrawals and weights arrive in between.
        "max_concurrency": 16,
        "runtime_env": _threads(config.threads, config.gpus),
    }


def require_room(options: dict[str, Any], more: int, key: str) -> None:
    """Raises `UserError` when the cluster has no resources for `more` actors of these `options`,
    and is not one that grows."""
    free = ray.available_resources()
    for kind, name in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        wanted, there = more * options.get(name, 0), free.get(kind, 0.0)
        if wanted > there + 1e-9 and not ask_to_grow(options, more):
            raise UserError(
                f"{more} more would need {wanted:g} {kind} and the cluster has {there:g} free; "
                f"lower {key}.{kind.lower()}s, or add machines"
            )


def ask_to_grow(options: dict[str, Any], more: int) -> bool:
    """Ask Ray's autoscaler for room; whether there is one, and it may make that much."""
    from ray._private.state import state
    from ray.autoscaler.sdk import request_resources

    largest = state.get_max_resources_from_cluster_config()
    if largest is None:  # the cluster has no node types that could be added
        return False
    bundle = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0)}
    present = ray.cluster_resources()
    for kind, each in bundle.items():
        used = present.get(kind, 0.0) - ray.available_resources().get(kind, 0.0)
        if used + each * more > largest.get(kind, 0):
            return False
    request_resources(bundles=[{kind: each for kind, each in bundle.items() if each}] * more)
    return True


def _threads(threads: int, gpus: float) -> dict[str, Any]:
    env = worker_env() | {"OMP_NUM_THREADS": str(threads)}
    if not gpus:
        # Asking vLLM for logprobs compiles a sampler for many seconds, for no gain on a CPU.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return {"env_vars": env}
