"""What does not fit the cluster is refused, since Ray would wait for it without end."""

from __future__ import annotations

import pytest

from actors.placement import ask_to_grow, place, place_rollout, require_room
from raylign.config import AlignConfig, LearnerConfig, RolloutConfig, UserError


def test_a_run_that_does_not_fit_is_refused(ray_cluster: None) -> None:
    placement = place(AlignConfig())
    assert placement.rollout["num_cpus"] == RolloutConfig().cpus
    assert placement.learner["runtime_env"]["env_vars"]["TORCHDYNAMO_DISABLE"] == "1"
    with pytest.raises(UserError, match=r"align needs 999.* CPU \(2 rollout, 1 reward and 9"):
        place(AlignConfig(learner=LearnerConfig(count=9, cpus=111)))
    with pytest.raises(UserError, match=r"needs 2 GPU .* the cluster has 0; lower align"):
        place(AlignConfig(rollout=RolloutConfig(gpus=1)))


def test_more_workers_than_there_is_room_for_are_refused(ray_cluster: None) -> None:
    require_room(place_rollout(RolloutConfig(cpus=0.01)), 1, "align.rollout")
    options = place_rollout(RolloutConfig(cpus=50))
    assert not ask_to_grow(options, 1)  # nothing that could be added
    with pytest.raises(UserError, match=r"2 more would need 100 CPU .*lower align.rollout.cpus"):
        require_room(options, 2, "align.rollout")
