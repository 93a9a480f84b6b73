"""Reinforcement learning: the timeline of its actors, and rollouts to read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.evaluation.report.document import (
    Attempt,
    Block,
    Exchange,
    Exchanges,
    Fact,
    Facts,
    Gantt,
    Lane,
    Section,
    Span,
)
from raylign.evaluation.report.figures import show_number, show_percent, show_seconds
from raylign.evaluation.report.findings import Findings
from raylign.evaluation.report.timeline import (
    Event,
    choose_window,
    find_extent,
    measure_overlap,
    measure_shares,
    merge_spans,
    order_actors,
)

ATTEMPTS_SHOWN = 4
LANES_SHOWN = 40
CONCURRENT = ("generate", "score")
TIMES = "\N{MULTIPLICATION SIGN}"


def build_timeline(findings: Findings) -> Section | None:
    """Who did what when, and how much generation and learning overlapped."""
    events = findings.events
    if not events:
        return None
    start, end = choose_window(events)
    shares = measure_shares(events)
    inside = [e for e in events if e.end > start and e.start < end]
    actors = order_actors(events)
    lanes = [
        Lane(actor, _cut_spans(inside, actor, start, end), shares.get(actor, {}))
        for actor in _choose_lanes(actors)
    ]
    together, learning = measure_overlap(events)
    steps = sorted(
        {s.step for lane in lanes for s in lane.spans if s.what == "learn" and s.step is not None}
    )
    window = f"Steps {steps[0]} to {steps[-1]}" if steps else "A few steps"
    first, last = find_extent(events)
    facts = (
        Fact(
            "Learning overlapped by generation",
            show_percent(together / learning) if learning else "n/a",
            f"{show_seconds(together)} of {show_seconds(learning)} of learning",
        ),
        Fact("Whole loop", show_seconds(last - first), f"{len(actors)} actors"),
    )
    gantt = Gantt(
        lanes=tuple(lanes),
        seconds=end - start,
        title=f"{window}, {show_seconds(end - start)} from the middle of the run",
        meaning="One lane an actor. Where a rollout's generate bar stands above the learner's "
        "learn bar, new answers are being sampled while older ones are learned from. The bars "
        "on the right are the whole run."
        + (f" {len(lanes)} of {len(actors)} actors are shown." if actors[LANES_SHOWN:] else ""),
    )
    return Section(
        key="timeline",
        title="Who was busy when",
        lead=_describe_overlap(together, learning),
        blocks=(Facts(facts), gantt),
    )


def _choose_lanes(actors: Sequence[str]) -> list[str]:
    """As many as can be read, and the last ones for sure: they learn."""
    if len(actors) <= LANES_SHOWN:
        return list(actors)
    last = LANES_SHOWN // 4
    return [*actors[: LANES_SHOWN - last], *actors[-last:]]


def _cut_spans(events: Sequence[Event], actor: str, start: float, end: float) -> tuple[Span, ...]:
    """What an actor did between `start` and `end`; what it does to many groups at once is one
    span."""
    inside = [e for e in events if e.actor == actor]
    single = [(e.what, e.start, e.end, e.step) for e in inside if e.what not in CONCURRENT]
    joined = [
        (what, *span, None)
        for what in CONCURRENT
        for span in merge_spans((e.start, e.end) for e in inside if e.what == what)
    ]
    return tuple(
        Span(what, max(begun, start) - start, min(ended, end) - start, step)
        for what, begun, ended, step in (*single, *joined)
    )


def _describe_overlap(together: float, learning: float) -> str:
    simple = "In a simple system sampling and learning take turns, each waiting for the other."
    if together > 0.1 * learning:
        return (
            f"{simple} Here they overlap: while the learner digests one batch, the rollouts "
            "already write the next."
        )
    return f"{simple} So they did here: this run is (nearly) synchronous."


def build_rollouts(findings: Findings) -> Section | None:
    """Completions with their rewards at the first, a middle and the last saved step."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in findings.examples:
        by_step.setdefault(int(row["step"]), []).append(row)
    steps = sorted(by_step)
    if not steps:
        return None
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    exchanges = []
    for step in chosen:
        row = by_step[step][0]
        attempts = _list_attempts(row["completions"])
        title = f"Step {step}: {_count_right(row['completions'])}"
        exchanges.append(Exchange(title, str(row["prompt"]), str(row["reference"]), attempts))
    blocks: tuple[Block, ...] = (
        Exchanges(
            tuple(exchanges),
            "Answers to one question form a group; each is judged against the mean of its group. "
            "The number is the total reward; beside it stand its parts, the version of the policy "
            "that wrote it, and how many answers of the group are the same word for word.",
        ),
    )
    return Section(
        key="rollouts",
        title="Rollouts to read",
        lead="What the policy sampled as learning went on, one line for each step of its working.",
        blocks=blocks,
    )


def _count_right(completions: Sequence[Mapping[str, Any]]) -> str:
    """Of a group: how many are correct, where that is a part of the reward; else what they got."""
    parts = [completion.get("parts", {}) for completion in completions]
    if any("correct" in part for part in parts):
        return f"{sum(float(p.get('correct', 0)) > 0 for p in parts)} of {len(parts)} correct"
    rewards = [float(c["reward"]) for c in completions if c.get("reward") is not None]
    if not rewards:
        return "no rewards"
    return f"rewards from {show_number(min(rewards))} to {show_number(max(rewards))}"


def _list_attempts(completions: Sequence[Mapping[str, Any]]) -> tuple[Attempt, ...]:
    """The first different texts of a group, each with how often it was written."""
    written: dict[str, list[Mapping[str, Any]]] = {}
    for completion in completions:
        written.setdefault(str(completion["text"]), []).append(completion)
    rewards = [float(c["reward"]) for c in completions if c.get("reward") is not None]
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    shown = list(written.values())[:ATTEMPTS_SHOWN]
    return tuple(_judge(same[0], len(same), mean) for same in shown)


def _judge(completion: Mapping[str, Any], times: int, mean: float) -> Attempt:
    """An answer; good if it is correct or, where nothing says so, better than its group's mean."""
    parts, reward = completion.get("parts", {}), completion.get("reward")
    right = reward is not None and float(reward) > mean
    if "correct" in parts:
        right = float(parts["correct"]) > 0
    notes = [f"{name} {show_number(float(value))}" for name, value in sorted(parts.items())]
    version = completion.get("version")
    if version is not None:
        notes.append(f"v{version}")
    if times > 1:
        notes.append(f"{TIMES}{times}")
    return Attempt(
        text=lay_out(str(completion["text"])),
        badge="n/a" if reward is None else show_number(float(reward)),
        tone="good" if right else "bad",
        note=", ".join(notes),
    )


def lay_out(text: str) -> str:
    """A completion with one line for each step of its working, and one for the answer."""
    match = re.fullmatch(r"\s*<work>(.*?)</work>\s*<answer>(.*?)</answer>(.*)", text, re.DOTALL)
    if match is None:
        return text.strip()
    working, answer, rest = (part.strip() for part in match.groups())
    lines: Sequence[str] = [*(step.strip() for step in working.split(";")), f"answer: {answer}"]
    return "\n".join([*lines, *([rest] if rest else [])])
