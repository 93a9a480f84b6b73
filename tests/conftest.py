"""Fixtures that several test files share: a private Ray cluster and a tiny model."""

from __future__ import annotations

import os

# Before torch is imported: compilation costs more than these models' whole runs.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Tests run side by side: threads of several that wait for each other by spinning take the cores
# from whoever works.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model

# On several workers whole files are dealt out, in this order: the longest must not come last.
LONGEST_FILES = (
    "test_quickstart_job.py",
    "test_rollout_pool.py",
    "test_learner.py",
    "test_reward.py",
    "test_learner_state.py",
    "test_faults.py",
    "test_training_jobs.py",
    "test_prepare_corpora.py",
    "test_evaluate_job.py",
    "test_resume.py",
    "test_engines.py",
    "test_parallel.py",
    "test_tune_job.py",
    "test_pipeline.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; the others stay in order."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private cluster of two CPUs."""
    from raylign.config import RayConfig
    from raylign.runtime import connect, disconnect

    connect(RayConfig(num_cpus=2))
    yield
    disconnect()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 64 tokens of context with a word tokenizer and chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))
