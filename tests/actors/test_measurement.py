"""What a step shows of its samples."""

from __future__ import annotations

import numpy as np
import pytest

from actors.buffer import Group
from actors.learner import LearnerReport
from actors.measurement import measure_step
from raylign.records import Trajectory


def scored(reward: float, **parts: float) -> Trajectory:
    return Trajectory(
        prompt_id="p",
        group_id="g",
        token_ids=np.array([5, 6], np.int32),
        loss_mask=np.array([False, True]),
        logprobs=np.zeros(2, np.float32),
        versions=np.array([-1, 3], np.int32),
        finish_reason="stop",
        text="",
        reward=reward,
        reward_parts=parts,
    )


def measure(*learned: Trajectory) -> dict[str, float]:
    report = LearnerReport({}, 0.0, (), {}, 1.0, 3.0)
    return measure_step([Group(learned, (), "g")], learned, report, 4)


def test_what_is_measured_beside_the_reward_is_held_against_it() -> None:
    rows = [(1.0, 1.0), (3.0, 0.0), (2.0, 1.0), (6.0, 0.0)]
    learned = [scored(total, learned=total, truth=truth) for total, truth in rows]
    metrics = measure(*learned)
    assert metrics["reward/total"] == metrics["reward/learned"] == 3.0
    assert metrics["reward/truth"] == 0.5 and metrics["staleness/max"] == 1
    # Offsets -2, 0, -1, 3 and 1/2, -1/2, 1/2, -1/2: -3 over the root of 14 times 1.
    assert metrics["agreement/truth"] == pytest.approx(-3 / 14**0.5)
    assert "agreement/learned" not in metrics
    assert metrics["agreement/truth"] == pytest.approx(float(np.corrcoef(np.array(rows).T)[0, 1]))


def test_what_is_always_the_same_agrees_with_nothing() -> None:
    metrics = measure(scored(1.0, truth=1.0), scored(0.3, truth=1.0), scored(0.1, truth=1.0))
    assert metrics["reward/truth"] == 1.0 and "agreement/truth" not in metrics
    assert "agreement/truth" not in measure(scored(0.1, truth=0.0), scored(0.1, truth=1.0))
