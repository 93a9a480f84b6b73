"""Joining Ray: the only `ray.init`, how workers find this code, and seeds."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from pathlib import Path

import numpy as np

from raylign.config import RayConfig, UserError

_SOURCE = Path(__file__).resolve().parents[1]

# Worker processes inherit these; each is needed before its library is imported.
_LIBRARY_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # `report()` waits for one poll of 2 s otherwise
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The engine lives in its worker's own process: it starts in seconds and cannot be orphaned.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def worker_env() -> dict[str, str]:
    """Environment of Ray workers: import path (in a checkout) and library switches."""
    env = dict(_LIBRARY_ENV)
    if _SOURCE.name == "platform":
        # Absolute for workers on this machine, relative for those that unpacked a working_dir.
        env["PYTHONPATH"] = os.pathsep.join([str(_SOURCE), _SOURCE.name, str(_SOURCE.parent)])
    if not _has_gpu():
        env["DS_ACCELERATOR"] = "cpu"
    return env


def connect(config: RayConfig | None = None) -> None:
    """Join the submitted job's cluster, the configured one, or a private local one.

    Never joins a cluster that merely happens to run on this machine. Raises `UserError` when the
    cluster cannot be reached.
    """
    import ray

    config = config or RayConfig()
    for key, value in _LIBRARY_ENV.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, object] = {}
    if address == "local":
        options = {"num_cpus": config.num_cpus or os.cpu_count(), "include_dashboard": False}
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": worker_env()},
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
    except ConnectionError as error:
        raise UserError(f"ray.address={address!r} cannot be reached: {error}") from None


def in_submitted_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one purpose; different names give independent streams."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch of this process."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))
