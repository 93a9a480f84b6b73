"""Learning rates at the steps where they can be told by hand."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jobs.pretrain import count_steps
from raylign.config import Recipe, ScheduleConfig, SftConfig, UserError
from raylign.training.schedule import learning_rate


def trace(
    shape: str, steps: int, *, warmup: int | None = 0, final: float = 0.1, decay: float = 0.2
) -> list[float]:
    return [
        learning_rate(
            step,
            steps,
            2.0,
            shape=shape,  # type: ignore[arg-type]
            warmup_steps=warmup,
            final_ratio=final,
            decay_share=decay,
        )
        for step in range(steps)
    ]


def test_warm_up_rises_linearly_and_moves_at_once() -> None:
    rates = trace("constant", 6, warmup=3)
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear_ends_at_the_final_ratio() -> None:
    assert trace("linear", 5) == pytest.approx([2.0, 1.55, 1.1, 0.65, 0.2])
    assert trace("linear", 7, warmup=2)[2:] == pytest.approx([2.0, 1.55, 1.1, 0.65, 0.2])


def test_cosine_is_halfway_in_the_middle() -> None:
    rates = trace("cosine", 11, final=0.0)
    assert rates[0] == pytest.approx(2.0) and rates[10] == pytest.approx(0.0)
    assert rates[5] == pytest.approx(1.0)
    assert rates[3] - rates[4] > rates[0] - rates[1]


def test_wsd_is_stable_until_its_last_share() -> None:
    rates = trace("wsd", 20, warmup=2, final=0.0, decay=0.25)
    assert rates[2:15] == pytest.approx([2.0] * 13)
    assert rates[14:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4, 0.0])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("warmup", [0, 5, 100])
def test_rates_stay_in_range_for_odd_numbers_of_steps(shape: str, steps: int, warmup: int) -> None:
    rates = trace(shape, steps, warmup=warmup)
    assert all(0 < rate <= 2.0 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (12, 1), (60, 6), (1000, 20)])
def test_the_usual_warm_up_leaves_most_of_a_short_run(steps: int, warmup: int) -> None:
    assert trace("cosine", steps, warmup=None) == trace("cosine", steps, warmup=warmup)


@pytest.mark.parametrize(
    ("stage", "section"),
    [
        ("sft", {"steps": 10, "schedule": {"warmup_steps": 10}}),
        ("pretrain", {"schedule": {"warmup_steps": 300}}),
        ("align", {"steps": 5, "schedule": {"warmup_steps": 5}}),
    ],
)
def test_a_warm_up_that_never_ends_is_refused(stage: str, section: dict[str, Any]) -> None:
    steps = section.get("steps", 300)
    with pytest.raises(ValidationError, match=rf"warmup_steps={steps} never .* in steps={steps}; "):
        Recipe.model_validate({stage: section})
    section["schedule"]["warmup_steps"] -= 1
    assert Recipe.model_validate({stage: section})


def test_of_passes_over_the_data_it_is_known_when_the_rows_are_counted() -> None:
    config = SftConfig(epochs=2, batch_size=4, schedule=ScheduleConfig(warmup_steps=10))
    assert count_steps("sft", config, 21) == 11
    with pytest.raises(UserError, match=r"^sft: schedule.warmup_steps=10 .*epochs=2, 10 steps; "):
        count_steps("sft", config, 20)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape must be"):
        trace("square", 3)
