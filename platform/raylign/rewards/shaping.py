"""Pure functions that shape a reward."""

from __future__ import annotations


def penalise_length(tokens: int, longest: int, margin: int) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13), in [-1, 0], to be added.

    0 up to `longest - margin` tokens, then falling linearly to -1 at `longest`, and -1 beyond.
    Raises `ValueError` unless 0 < margin <= longest.
    """
    if not 0 < margin <= longest:
        raise ValueError(f"margin={margin} must be in 1..{longest}, the longest length")
    return clip_reward((longest - margin - tokens) / margin, -1.0, 0.0)


def clip_reward(reward: float, low: float, high: float) -> float:
    """`reward`, but at least `low` and at most `high`. Raises `ValueError` unless low <= high."""
    if low > high:
        raise ValueError(f"low={low} exceeds high={high}")
    return min(max(reward, low), high)
