"""Knobs of the generated arithmetic textbook."""

from __future__ import annotations

from pydantic import Field

from raylign.config.section import Count, Section, Share


class TextbookConfig(Section):
    """The generated arithmetic textbook, its exercises and the held-out problems."""

    pages: int = Field(default=6000, ge=0)
    """Pages of the textbook."""
    max_digits: int = Field(default=3, ge=1, le=6)
    """Digits of the largest operand."""
    worked_share: Share = 0.85
    """Share of textbook lines that are worked examples."""
    exercises: int = Field(default=16000, ge=0)
    """Chat demonstrations for supervised fine-tuning."""
    exercise_worked_share: tuple[Share, ...] = (0.9, 0.75, 0.25)
    """Share of demonstrations that show their working, by digits of the larger operand; the last
    entry serves all longer ones."""
    exercise_tool_share: tuple[Share, ...] = (0.0,)
    """Share of demonstrations that call a calculator, by digits of the larger operand; the last
    entry serves all longer ones. The shares above are of the others."""
    prompts: int = Field(default=4000, ge=0)
    """Questions for reinforcement learning."""
    held_out: Count = 600
    """Problems kept out of everything above, for evaluation."""
