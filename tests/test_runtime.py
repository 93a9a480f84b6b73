"""Joining Ray: workers find the code, strangers are not joined, seeds are streams."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from raylign.runtime import (
    connect,
    derive_seed,
    in_submitted_job,
    is_full,
    seed_everything,
    worker_env,
)

ROOT = Path(__file__).resolve().parents[1]


def run_alone(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process that has not joined Ray yet, from another directory."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"} | env,
        timeout=120,
    )


def test_tasks_and_actors_can_import_this_checkout(ray_cluster: None) -> None:
    import ray

    def locate() -> tuple[str, str, str, str]:
        import platform

        import actors
        import raylign
        from raylign.records import Prompt

        assert Prompt("p", (1,), "", "").token_ids == (1,)
        return raylign.__file__, actors.__file__, platform.system(), os.environ["DS_ACCELERATOR"]

    class Locator:
        def locate(self) -> tuple[str, str, str, str]:
            return locate()

    task = ray.remote(num_cpus=0.1)(locate)
    actor = ray.remote(num_cpus=0.1)(Locator).remote()
    source, hosts = str(ROOT / "platform/raylign"), str(ROOT / "actors")
    for found in ray.get([task.remote(), actor.locate.remote()], timeout=60):
        assert found[0].startswith(source) and found[1].startswith(hosts)
        assert found[2] == "Linux"


def test_connecting_again_changes_nothing(ray_cluster: None) -> None:
    import ray

    before = ray.get_runtime_context().get_node_id()
    connect()
    assert ray.get_runtime_context().get_node_id() == before
    assert ray.cluster_resources()["CPU"] == 2


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "http://x:1"])
def test_an_unreachable_address_is_said_at_once(address: str) -> None:
    code = (
        "from raylign.config import RayConfig\nfrom raylign.runtime import connect\n"
        f"connect(RayConfig(address={address!r}))"
    )
    started = time.monotonic()
    done = run_alone(code)
    assert f"UserError: ray.address='{address}' cannot be joined" in done.stderr.splitlines()[-1]
    assert time.monotonic() - started < 60  # Ray itself tries for many minutes


@pytest.mark.slow
def test_a_machine_too_busy_to_start_ray_is_one_line() -> None:
    """Its node does not register in time; the clock is Ray's own, and goes faster here."""
    code = (
        "import itertools, time, types\nimport ray._private.node as node\n"
        "from ray._private import services\nfrom raylign.config import RayConfig\n"
        "from raylign.runtime import connect\nclock = itertools.count(step=20)\n"
        "node.time = types.SimpleNamespace(**vars(time) | {'monotonic': lambda: next(clock)})\n"
        "def absent(*names): raise RuntimeError('not registered')\n"
        "services.get_node = absent\nconnect(RayConfig(num_cpus=1))"
    )
    done = run_alone(code, RAYLIGN_TEST_MARK="busy")
    last = done.stderr.splitlines()[-1]
    assert "UserError: Ray did not start within half a minute" in last, done.stderr
    for _ in range(100):
        left = [p for p in psutil.process_iter() if is_marked(p, "busy")]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("RAYLIGN_TEST_MARK") == mark
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_cluster_that_merely_runs_here_is_not_joined(ray_cluster: None) -> None:
    import ray

    code = (
        "import ray\nfrom raylign.config import RayConfig\nfrom raylign.runtime import *\n"
        "connect(RayConfig(num_cpus=1)); print(ray.get_runtime_context().gcs_address); disconnect()"
    )
    done = run_alone(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != ray.get_runtime_context().gcs_address


def test_worker_paths_are_absolute_and_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [str(ROOT / "platform"), "platform", str(ROOT)]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert worker_env()["PYTHONPATH"].split(":") == own
    # Where a user's rewards are found here, workers find them too; nothing stands there twice.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}::/rewards:{ROOT / 'platform'}")
    assert worker_env()["PYTHONPATH"].split(":") == [*own, "/rewards"]


def test_a_submitted_job_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not in_submitted_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_submitted_job()


def test_seeds_are_stable_and_different() -> None:
    # The value is part of every run's identity: it may not change between versions.
    assert derive_seed(0, "align", 3) == 5320081283112175718
    seeds = {
        derive_seed(seed, name, step) for seed in range(5) for name in "abc" for step in range(20)
    }
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeding_fixes_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        seed_everything(derive_seed(1, "x"))
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()


def test_a_full_disk_is_known_whoever_says_so() -> None:
    with Path("/dev/full").open("wb", buffering=0) as stream:
        with pytest.raises(OSError) as by_number:
            stream.write(b"text")
        with pytest.raises(OSError) as in_words:
            np.zeros(1 << 16).tofile(stream)
    assert in_words.value.errno is None  # this is why words are looked at
    assert is_full(by_number.value) and is_full(in_words.value)
    assert not is_full(FileNotFoundError(2, "no such file")) and not is_full(OSError("broken"))
