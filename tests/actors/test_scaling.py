"""The balance adds where the learner waits, removes where workers do, and else leaves it."""

from __future__ import annotations

from actors.scaling import Balance
from raylign.config import ScalingConfig


def test_it_follows_who_waits() -> None:
    config = ScalingConfig(
        policy="balance", least=1, most=3, every_steps=2, learner_waits=0.3, rollouts_wait=0.5
    )
    balance = Balance(config)
    assert balance.advise(1, 8.0, 0.0, 10.0) == 1  # one step says little
    assert balance.advise(1, 8.0, 0.0, 10.0) == 2
    assert [balance.advise(2, 2.0, 2.0, 10.0) for _ in range(4)] == [2] * 4  # in between: stays
    assert [balance.advise(2, 0.0, 7.0, 10.0) for _ in range(2)] == [2, 1]
    assert [balance.advise(1, 0.0, 9.0, 10.0) for _ in range(2)] == [1, 1]  # never below the least
    assert [balance.advise(3, 9.0, 0.0, 10.0) for _ in range(2)] == [3, 3]  # nor above the most


def test_waiting_for_rewards_adds_nobody() -> None:
    """Slow scoring makes both wait: the learner all the time, workers when they have sampled."""
    config = ScalingConfig(policy="balance", every_steps=1)
    assert Balance(config).advise(3, 9.5, 9.0, 10.0) == 2  # two would be idle most of the time, too
    assert Balance(config).advise(2, 9.5, 6.0, 10.0) == 2  # one would be busy most of the time
    assert Balance(config).advise(1, 9.5, 4.0, 10.0) == 2


def test_long_steps_count_for_more() -> None:
    balance = Balance(ScalingConfig(policy="balance", every_steps=2, learner_waits=0.5))
    balance.advise(1, 1.0, 0.0, 1.0)
    assert balance.advise(1, 0.0, 0.0, 9.0) == 1  # a tenth of the time in all
