"""Who sits where: Ray resources of every actor of a run, decided and checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from raylign.config import AlignConfig, UserError
from raylign.runtime import worker_env


@dataclass(frozen=True, slots=True)
class Placement:
    """Options of `ray.remote(...).options(**...)` by role."""

    rollout: dict[str, Any]
    reward: dict[str, Any]
    learner: dict[str, Any]


def place(config: AlignConfig) -> Placement:
    """Options for every role.

    Raises `UserError` when the cluster is too small: Ray would wait for resources without end.
    """
    wanted = {
        "CPU": config.rollout.count * config.rollout.cpus
        + config.reward.count * config.reward.cpus
        + config.learner.count * config.learner.cpus,
        "GPU": config.rollout.count * config.rollout.gpus
        + config.learner.count * config.learner.gpus,
    }
    present = ray.cluster_resources()
    for kind, amount in wanted.items():
        if amount > present.get(kind, 0.0) + 1e-9:
            raise UserError(
                f"align needs {amount:g} {kind} ({config.rollout.count} rollout, "
                f"{config.reward.count} reward and {config.learner.count} learner workers), the "
                f"cluster has {present.get(kind, 0.0):g}; lower align.*.{kind.lower()}s or counts"
            )
    return Placement(
        # Several calls at once: groups join the running batch, and syncs arrive in between.
        rollout={
            "num_cpus": config.rollout.cpus,
            "num_gpus": config.rollout.gpus,
            "max_concurrency": 1024,
            "runtime_env": _threads(config.rollout.threads, config.rollout.gpus),
        },
        reward={"num_cpus": config.reward.cpus, "runtime_env": _threads(1, 0)},
        learner={
            "num_cpus": config.learner.cpus,
            "num_gpus": config.learner.gpus,
            "runtime_env": _threads(config.learner.threads, config.learner.gpus),
        },
    )


def _threads(threads: int, gpus: float) -> dict[str, Any]:
    env = worker_env() | {"OMP_NUM_THREADS": str(threads)}
    if not gpus:
        # Asking vLLM for logprobs compiles a sampler for many seconds, for no gain on a CPU.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return {"env_vars": env}
