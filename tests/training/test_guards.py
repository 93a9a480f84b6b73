"""A guard speaks when the mean of a full window crosses its bound, and names what and where."""

from __future__ import annotations

from raylign.config import GuardConfig
from raylign.training.guards import Guard


def test_a_collapse_is_seen_in_the_mean_of_the_window() -> None:
    guard = Guard(GuardConfig(window=3, min_entropy=0.5, max_kl=1.0))
    fine = {"entropy": 0.9, "kl": 0.1}
    assert guard.look(0, fine) is None and guard.look(1, fine) is None
    assert guard.look(2, {"entropy": 0.0, "kl": 0.1}) is None  # one bad step: mean 0.6
    breach = guard.look(3, {"entropy": 0.3, "kl": 0.1})  # 0.9, 0, 0.3: mean 0.4
    assert breach is not None
    assert (breach.metric, breach.back_to, breach.key) == ("entropy", 1, "min_entropy")
    assert abs(breach.value - 0.4) < 1e-12
    text = breach.describe(3)
    assert text == "entropy is 0.4 over the last 3 steps, below align.guard.min_entropy=0.5"
    guard.forget()
    assert guard.look(4, {"entropy": 0.0, "kl": 9.0}) is None


def test_upper_bounds_and_metrics_that_are_not_there() -> None:
    guard = Guard(GuardConfig(window=1, max_kl=1.0, max_truncated=0.5, min_length=2.0))
    assert guard.look(0, {"entropy": 0.0}) is None
    breach = guard.look(1, {"kl": 1.5})
    assert breach is not None and "above align.guard.max_kl=1" in breach.describe(1)
    assert guard.look(2, {"kl": 1.0, "length": 2.0, "truncated": 0.5}) is None
    assert guard.look(3, {"truncated": 0.75}).key == "max_truncated"  # type: ignore[union-attr]
    assert guard.look(4, {"length": 1.0}).key == "min_length"  # type: ignore[union-attr]


def test_a_policy_that_was_beyond_the_bound_is_not_gone_back_to() -> None:
    """A step's numbers are those of the policy that it begins with."""
    guard = Guard(GuardConfig(window=2, min_entropy=0.5, max_kl=1.0))
    assert [guard.look(0, {"entropy": 0.9}), guard.look(1, {"entropy": 0.6})] == [None, None]
    breach = guard.look(2, {"entropy": 0.3})  # 0.6 at step 1 was sound
    assert breach is not None and breach.back_to == 1
    guard.forget()
    assert guard.look(5, {"kl": 1.5}) is None
    breach = guard.look(6, {"kl": 2.0})  # 1.5 at step 5 was not
    assert breach is not None and breach.back_to == 4


def test_without_bounds_nothing_is_a_collapse() -> None:
    guard = Guard(GuardConfig(window=1))
    assert guard.look(0, {"entropy": 0.0, "kl": 1e9, "length": 0.0, "truncated": 1.0}) is None
