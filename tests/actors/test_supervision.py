"""What is said when there is nothing to learn from names who is to be seen to."""

from __future__ import annotations

from actors.supervision import explain_drought
from raylign.config import JudgeConfig
from raylign.rewards.outcomes import Rejection


def test_a_judge_that_says_nothing_is_named() -> None:
    silent = [Rejection("p", "g", "judge call failed", f"ConnectError: {n}") for n in range(3)]
    judge = JudgeConfig(endpoint="http://here/v1", endpoint_model="m")
    assert explain_drought([*silent, Rejection("p", "g", "empty")], judge) == (
        "no sample can be learned from (3 judge call failed: ConnectError: 0; 1 empty); see to "
        "align.judge.endpoint=http://here/v1, and run the same again to go on"
    )
    assert "align.judge.model=m" in explain_drought(silent, JudgeConfig(model="m"))


def test_of_other_sources_the_reward_is_to_be_looked_at() -> None:
    said = explain_drought([Rejection("p", "g", "reward is nan")] * 2, JudgeConfig())
    assert said.startswith("no sample can be learned from (2 reward is nan); check align.reward")
    assert "judge" not in said
