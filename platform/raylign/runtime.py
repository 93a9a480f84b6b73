"""Joining Ray: the only `ray.init`, how workers find this code, and seeds."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from raylign.config import RayConfig, UserError

_SOURCE = Path(__file__).resolve().parents[1]
_configured = RayConfig()
_PRIVATE = "RAYLIGN_PRIVATE_CLUSTER"
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"

# Worker processes inherit these; each is needed before its library is imported.
_LIBRARY_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # so soon a dead rank, or the end, is noticed
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else a recipe's relative paths are others in a worker
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune's banners; jobs.tune shows its own progress
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
        # Absolute for workers on this machine, relative for those that unpacked a working_dir;
        # then what the user has put there, such as the directory of a reward function.
        own = [str(_SOURCE), _SOURCE.name, str(_SOURCE.parent)]
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        more = [str(Path(entry).resolve()) for entry in given if entry]
        env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*own, *more]))
    if not _has_gpu():
        env["DS_ACCELERATOR"] = "cpu"
    if is_private():
        env |= {
            name: os.environ[name] for name in (_PRIVATE, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
        }
    return env


def is_private() -> bool:
    """Whether the cluster that was joined, here or by who started this process, ends with it."""
    return _PRIVATE in os.environ


def configure(config: RayConfig) -> None:
    """Say how `connect` is to reach Ray, without doing it yet."""
    global _configured
    _configured = config


def connect(config: RayConfig | None = None) -> None:
    """Join the submitted job's cluster, the configured one, or a private local one; once.

    Never joins a cluster that merely happens to run on this machine. Raises `UserError` when the
    cluster cannot be reached, or a private one does not start.
    """
    import ray

    if ray.is_initialized():
        return
    for key, value in _LIBRARY_ENV.items():
        os.environ.setdefault(key, value)
    config = config or _configured
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        cpus = config.num_cpus or os.cpu_count()
        options = {"num_cpus": cpus, "include_dashboard": False}
        os.environ[_PRIVATE] = "1"
        # Nobody takes the one machine away piecemeal; the watcher would be a process of its own.
        os.environ.setdefault(_WATCHER, "0")
    try:
        _probe(address)
        with _own_sigterm():
            ray.init(
                address=address,
                runtime_env={"env_vars": worker_env()},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"ray.address={address!r} cannot be joined ({reason}); start a cluster there with "
            "`ray start --head`, or leave ray.address out for a private one"
        ) from None
    except Exception as error:  # Ray has no type for this one
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start within half a minute: this machine is too busy, or short of memory; "
            "run the same again when it has room"
        ) from None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM; `ray.init` puts one in place that exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _probe(address: str) -> None:
    """Raise `OSError` unless something listens at a host:port, where Ray would wait for minutes."""
    if address in ("local", "auto"):
        return
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise ValueError("expected host:port")
    socket.create_connection((host, int(port)), timeout=10).close()


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota was full; numpy says so without a number."""
    short = error.errno is None and re.search(r"\d+ requested and \d+ written", str(error))
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or bool(short)


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


def is_connected() -> bool:
    """Whether this process has joined Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def disconnect() -> None:
    """Leave Ray, and stop the private cluster if this process started one."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
        os.environ.pop(_PRIVATE, None)
