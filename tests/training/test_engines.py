"""Every engine, on one rank and on two, takes the same steps as plain torch on one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import raylign

sys.path.insert(0, str(Path(__file__).parent))

from engine_rank import OPTIMIZER, Case, build, draw_batch, run_case

from raylign.config import EngineConfig, OptimizerConfig
from raylign.training.engine import build_optimizer

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """Plain torch, one process, whole batches."""
    return run_case(Case(EngineConfig(backend="torch"), (1, 1, 1, 1)), Path())


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What every case found, by number of ranks; both groups run at the same time."""
    directory = tmp_path_factory.mktemp("ranks")
    source = Path(raylign.__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("engine_rank.py"))
    processes = []
    for world in (1, 2):
        port = str(_free_port())
        for rank in range(world):
            command = [sys.executable, script, str(directory), str(rank), str(world), port]
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    found = {world: torch.load(directory / f"results-{world}.pt") for world in (1, 2)}
    found[2]["printed"] = "".join(outputs)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def widest_gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*(f"zero{stage}{split}" for stage in STAGES for split in ("", "-split")), "torch"]
)
def test_two_ranks_take_the_steps_of_one(
    groups: dict[int, dict[str, Any]], reference: dict[str, Any], case: str
) -> None:
    found = groups[2][case]
    assert found["losses"] == pytest.approx(reference["losses"], abs=2e-6)
    assert found["norms"] == pytest.approx(reference["norms"], abs=2e-6)
    assert widest_gap(found["weights"], reference["weights"]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_takes_the_steps_however_the_batch_is_split(
    groups: dict[int, dict[str, Any]], reference: dict[str, Any], stage: int
) -> None:
    found = groups[1][f"zero{stage}-split"]
    assert found["norms"] == pytest.approx(reference["norms"], abs=2e-6)
    assert widest_gap(found["weights"], reference["weights"]) < 1e-6


@pytest.mark.parametrize("backend", [*(f"zero{stage}" for stage in STAGES), "torch"])
def test_resuming_changes_nothing(groups: dict[int, dict[str, Any]], backend: str) -> None:
    whole = groups[2][f"{backend}-split" if backend != "torch" else backend]
    resumed = groups[2][f"{backend}-resumed"]
    assert resumed["losses"] == whole["losses"]
    assert widest_gap(resumed["weights"], whole["weights"]) == 0.0


@pytest.mark.parametrize("backend", [*(f"zero{stage}" for stage in STAGES), "torch"])
def test_bfloat16_follows_float32(
    groups: dict[int, dict[str, Any]], reference: dict[str, Any], backend: str
) -> None:
    found = groups[2][f"{backend}-bfloat16"]
    assert found["losses"] == pytest.approx(reference["losses"], abs=2e-2)
    assert found["norms"] == pytest.approx(reference["norms"], rel=5e-2)
    assert widest_gap(found["weights"], reference["weights"]) < 3e-2


def test_recomputed_activations_change_nothing(
    groups: dict[int, dict[str, Any]], reference: dict[str, Any]
) -> None:
    found = groups[2]["zero3-checkpointing"]
    assert widest_gap(found["weights"], reference["weights"]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_are_scored_through_the_wrapped_model(
    groups: dict[int, dict[str, Any]], reference: dict[str, Any], stage: int
) -> None:
    gap = groups[2][f"zero{stage}"]["logprobs"] - reference["logprobs"]
    assert float(gap.abs().max()) < 1e-5


def test_a_missing_peer_is_given_up_on(groups: dict[int, dict[str, Any]]) -> None:
    assert 1.0 < groups[2]["waited"] < 5.0


def test_deepspeed_is_quiet(groups: dict[int, dict[str, Any]]) -> None:
    assert "DeepSpeed" not in groups[2]["printed"], groups[2]["printed"]


def test_only_matrices_decay() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([matrix, vector], OptimizerConfig(lr=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))
    assert torch.equal(vector, torch.ones(2))


def test_gradients_are_clipped_by_their_global_norm() -> None:
    engine = build(EngineConfig(backend="torch"), seed=7)
    tokens, _ = draw_batch(0)
    before = {name: t.clone() for name, t in engine.weights().items()}
    engine.backward(engine.module(input_ids=tokens).logits.square().sum())
    assert engine.step(1e-3) > OPTIMIZER.clip
    largest = max(float((t - before[name]).abs().max()) for name, t in engine.weights().items())
    assert 0 < largest < 2e-3  # Adam's first step moves by about the learning rate
