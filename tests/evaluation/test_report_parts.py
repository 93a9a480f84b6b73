"""Timeline arithmetic against brute force, ticks, sparklines and numbers as people read them."""

from __future__ import annotations

import itertools
import random

import pytest

from raylign.evaluation.report.alignment import lay_out
from raylign.evaluation.report.document import Chart, Series
from raylign.evaluation.report.figures import (
    show_count,
    show_number,
    show_percent,
    show_points,
    show_seconds,
)
from raylign.evaluation.report.learning import smooth
from raylign.evaluation.report.markdown import draw_spark
from raylign.evaluation.report.markup import element, text
from raylign.evaluation.report.plots import choose_ticks, draw_chart
from raylign.evaluation.report.timeline import (
    Event,
    choose_window,
    intersect_spans,
    measure,
    measure_overlap,
    measure_shares,
    merge_spans,
    order_actors,
    subtract_spans,
)


def draw_spans(rng: random.Random) -> list[tuple[float, float]]:
    starts = [rng.randrange(60) for _ in range(rng.randrange(8))]
    return [(float(s), float(s + rng.randrange(1, 9))) for s in starts]


def cells(spans: list[tuple[float, float]]) -> set[int]:
    """The unit cells that the spans cover."""
    return {i for start, end in spans for i in range(int(start), int(end))}


def test_span_arithmetic_is_set_arithmetic() -> None:
    rng = random.Random(0)
    for _ in range(300):
        first, second = draw_spans(rng), draw_spans(rng)
        a, b = merge_spans(first), merge_spans(second)
        assert cells(a) == cells(first) and measure(a) == len(cells(first))
        assert all(x[1] < y[0] for x, y in itertools.pairwise(a))
        assert cells(intersect_spans(a, b)) == cells(first) & cells(second)
        assert cells(subtract_spans(a, b)) == cells(first) - cells(second)
        assert measure(subtract_spans(a, b)) == len(cells(first) - cells(second))


def event(actor: str, what: str, start: float, end: float, step: int | None = None) -> Event:
    return Event(actor, what, start, end, step)


def test_overlap_counts_any_rollout_once() -> None:
    events = [
        event("rollout-0", "generate", 0, 6),
        event("rollout-1", "generate", 4, 8),
        event("learner", "learn", 5, 10),
        event("learner", "learn", 12, 14),
    ]
    assert measure_overlap(events) == (3.0, 7.0)
    assert measure_overlap([]) == (0, 0)


def test_shares_count_every_second_once() -> None:
    events = [
        event("learner", "learn", 0, 4),
        event("learner", "sync", 3, 5),
        event("learner", "wait", 0, 10),
        event("rollout-0", "generate", 5, 10),
    ]
    shares = measure_shares(events)
    assert shares["learner"] == pytest.approx({"sync": 0.2, "learn": 0.3, "wait": 0.5})
    assert shares["rollout-0"] == pytest.approx({"generate": 0.5})


def test_actors_stand_in_the_order_of_the_work() -> None:
    events = [
        event("learner", "sync", 0, 1),
        event("learner", "learn", 1, 2),
        event("reward-0", "score", 0, 1),
        event("rollout-1", "generate", 0, 1),
        event("rollout-0", "generate", 0, 1),
        event("controller", "wait", 0, 1),
    ]
    expected = ["rollout-0", "rollout-1", "reward-0", "learner", "controller"]
    assert order_actors(events) == expected


def test_the_window_is_a_few_steps_from_the_middle() -> None:
    events = [event("learner", "learn", 10.0 * s, 10.0 * s + 9, s) for s in range(11)]
    start, end = choose_window(events, steps=3)
    assert (round(start + 1.2, 6), round(end - 1.2, 6)) == (40.0, 70.0)
    assert choose_window(events[:2], steps=3) == (0.0, 19.0)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1.06), (35, 55), (-0.01, 0.012), (3, 3), (0, 0), (1e-9, 3e-9), (0, 4e5)]
)
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    ticks = choose_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high * (1 - 1e-9)
    assert 3 <= len(ticks) <= 9
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_an_axis_with_a_floor_stays_above_it() -> None:
    for value in (0.0, 0.02):
        series = Series("x", ((0.0, 0.0), (1.0, value)), "rl")
        drawn = draw_chart(Chart("t", (series,), "", unit="percent", floor=0.0))
        assert "%" in drawn and "\N{MINUS SIGN}" not in drawn


def test_smoothing_keeps_lines_straight() -> None:
    points = tuple((float(i), 2.0 * i) for i in range(20))
    assert smooth(points, 5) == points


def test_sparks_rise_with_the_values() -> None:
    assert draw_spark([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert draw_spark([0, 0, 1, 1], width=2) == "▁█"
    assert draw_spark([2, 2, 2]) == "▁▁▁"
    assert draw_spark([]) == ""


def test_numbers_read_well() -> None:
    assert [show_seconds(s) for s in (0.42, 9.97, 59.6, 529.8, 7500)] == [
        "0.4 s", "10 s", "1 min 00 s", "8 min 50 s", "2 h 05 min",
    ]  # fmt: skip
    assert show_percent(0.9153) == "91.5%"
    assert (show_points(0.295), show_points(-0.01)) == ("+29.5", "\N{MINUS SIGN}1.0")
    assert [show_count(c) for c in (950, 12400, 3.42e6)] == ["950", "12,400", "3.4 M"]
    assert show_number(8.9e-7, 2) == "8.9e\N{MINUS SIGN}7"
    assert [show_number(v) for v in (0, 0.0866, 54.81, 2812.3)] == ["0", "0.0866", "54.8", "2,812"]
    assert show_number(float("nan")) == "n/a"


def test_working_is_laid_out_in_lines() -> None:
    text = "<work>ones: 2+7=9; tens: 1+0=1</work><answer>19</answer>"
    assert lay_out(text) == "ones: 2+7=9\ntens: 1+0=1\nanswer: 19"
    assert lay_out("<work>unfinished") == "<work>unfinished"


def test_elements_escape_attributes_and_text() -> None:
    assert text("p", "<b>&", title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;&amp;</p>'
    drawn = element("text", "raw", text_anchor="end", class_="tick", x=1.25, y=None)
    assert drawn == '<text text-anchor="end" class="tick" x="1.2">raw</text>'
    assert text("p", "") == ""
