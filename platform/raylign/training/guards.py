"""When a run has collapsed: judged by the mean of the last few steps, as the recipe says."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from raylign.config import GuardConfig


@dataclass(frozen=True, slots=True)
class Breach:
    """A bound that was crossed."""

    metric: str
    value: float
    """Mean over the window."""
    bound: float
    back_to: int
    """The last step of which it is likely that the policy that it began with was sound: the
    window's first, or the one before that where even the first is beyond the bound."""
    key: str
    """Of the recipe, below `align.guard`."""

    def describe(self, window: int) -> str:
        """One line."""
        side = "below" if self.value < self.bound else "above"
        span = f"over the last {window} steps" if window > 1 else "in the last step"
        return (
            f"{self.metric} is {self.value:.4g} {span}, {side} "
            f"align.guard.{self.key}={self.bound:g}"
        )


class Guard:
    """Watches the metrics of every step."""

    # Key of the recipe, metric, and whether the bound is a lower one.
    _RULES = (
        ("min_entropy", "entropy", True),
        ("max_kl", "kl", False),
        ("min_length", "length", True),
        ("max_truncated", "truncated", False),
    )

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._seen: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=config.window)

    def look(self, step: int, metrics: Mapping[str, float]) -> Breach | None:
        """The first bound that the window's mean has crossed, once the window is full."""
        self._seen.append((step, metrics))
        if len(self._seen) < self._config.window:
            return None
        for key, metric, lower in self._RULES:
            bound = getattr(self._config, key)
            values = [m[metric] for _, m in self._seen if metric in m]
            if bound is None or len(values) < self._config.window:
                continue
            sign = 1.0 if lower else -1.0
            mean = sum(values) / len(values)
            if sign * mean < sign * bound:
                back_to = self._seen[0][0] - (sign * values[0] < sign * bound)
                return Breach(metric, mean, bound, back_to, key)
        return None

    def forget(self) -> None:
        """Start over, after a rollback."""
        self._seen.clear()
