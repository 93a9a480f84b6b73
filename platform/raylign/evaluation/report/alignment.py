"""Reinforcement learning: curves, the timeline of its actors, and rollouts to read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.evaluation.report.document import (
    Attempt,
    Block,
    Chart,
    Charts,
    Exchange,
    Exchanges,
    Fact,
    Facts,
    Gantt,
    Lane,
    Section,
    Series,
    Span,
)
from raylign.evaluation.report.figures import MINUS, show_number, show_percent, show_seconds
from raylign.evaluation.report.findings import Findings
from raylign.evaluation.report.learning import draw_lines
from raylign.evaluation.report.timeline import (
    Event,
    choose_window,
    find_extent,
    measure_overlap,
    measure_shares,
    merge_spans,
    order_actors,
)

MISMATCH_BAR = 1e-3
ATTEMPTS_SHOWN = 4
LANES_SHOWN = 40
CONCURRENT = ("generate", "score")
TIMES = "\N{MULTIPLICATION SIGN}"

# title, {metric: (name, colour)}, meaning, further options of Chart.
_CURVES: tuple[tuple[str, dict[str, tuple[str, str]], str, dict[str, Any]], ...] = (
    (
        "Reward",
        {
            "reward/total": ("total", "rl"),
            "reward/correct": ("correct", "base"),
            "reward/format": ("format", "sft"),
        },
        "Mean over each step's completions. Correct is the share with the right answer, format the "
        "share in the asked-for form; the total weighs them. Rising is learning.",
        {"floor": 0.0},
    ),
    (
        "KL to the reference",
        {"kl": ("KL", "rl")},
        "How far the policy has moved from the fine-tuned model. Slow growth is healthy; a sudden "
        "jump is a warning that it has found a trick.",
        {"floor": 0.0},
    ),
    (
        "Completion length",
        {"length": ("tokens", "rl")},
        "Tokens of an answer. It grows when showing the working pays, and shrinks when it does "
        "not.",
        {},
    ),
    (
        "Entropy",
        {"entropy": ("nats a token", "rl")},
        "How undecided the policy is at each token. It falls as the policy grows sure; at zero "
        "there is nothing left to explore.",
        {"floor": 0.0},
    ),
    (
        "Rollout/learner mismatch",
        {"mismatch/mean_abs": ("mean", "rl"), "mismatch/max_abs": ("largest", "sft")},
        "Sampler and learner compute the same log-probabilities with different programs; this is "
        "their difference. While the mean is below the bar, the two are the same policy.",
        {"log": True, "guide": (MISMATCH_BAR, f"1e{MINUS}3")},
    ),
    (
        "Staleness",
        {"staleness/mean": ("mean", "rl"), "staleness/max": ("largest", "sft")},
        "Policy versions between sampling and learning. 0 means strictly in turns; a bounded lag "
        "lets sampling and learning overlap.",
        {"floor": 0.0},
    ),
    (
        "Importance weights",
        {"importance/mean": ("mean weight", "rl")},
        "Corrects for samples drawn by a slightly older policy. Near 1 there is little to correct.",
        {},
    ),
    (
        "Truncated and clipped",
        {
            "importance/truncated": ("weights cut at the cap", "sft"),
            "clip_fraction": ("ratios clipped", "rl"),
        },
        "Share of tokens held back because their probability has moved too far at once. A few "
        "percent is normal.",
        {"unit": "percent", "floor": 0.0},
    ),
    (
        "Loss",
        {"loss": ("loss", "rl")},
        "Near 0, and that is normal: rewards are compared within each group of answers, so the "
        "ups and downs cancel. The gradient does the work, not the value.",
        {},
    ),
    (
        "Gradient norm",
        {"grad_norm": ("norm", "rl")},
        "Size of the push each step, before clipping. Spikes are steps that were held back.",
        {"floor": 0.0},
    ),
    (
        "Throughput",
        {"tokens_per_second": ("tokens a second", "rl")},
        "Sampled tokens learned from, for every second of the whole loop.",
        {"floor": 0.0},
    ),
    (
        "Waiting",
        {
            "wait/trainer": ("learner", "learn"),
            "wait/generator": ("rollouts", "generate"),
            "sync_seconds": ("weight sync", "sync"),
        },
        "Seconds a step in which a side had nothing to do, and seconds to hand new weights to the "
        "rollouts. The slower side should be the one that never waits.",
        {"unit": "seconds", "floor": 0.0},
    ),
    (
        "Workers",
        {},
        "Workers of each kind. There are more or fewer while the run goes on because somebody "
        "asked, because one side kept waiting for the other, or because one was lost.",
        {"floor": 0.0},
    ),
)


# Of these curves, the series that the run names itself begin with this.
_FAMILIES = {"Reward": "reward/", "Workers": "workers/"}
_FAMILY_COLORS = ("generate", "score", "learn", "sync", "ink", "data")


def build_curves(findings: Findings) -> Section | None:
    """Small multiples of everything that was logged."""
    charts = []
    for title, metrics, meaning, options in _CURVES:
        if title in _FAMILIES:
            metrics = metrics | _list_family(findings, _FAMILIES[title], metrics)
        found = {m: findings.column("align", m) for m in metrics}
        series: list[Series] = []
        for metric, (name, color) in metrics.items():
            if found[metric]:
                series.extend(draw_lines(name, found[metric], color))
        if series:
            charts.append(Chart(title, tuple(series), meaning, **options))
    charts.extend(_chart_drops(findings))
    if not charts:
        return None
    return Section(
        key="alignment",
        title="Reinforcement learning",
        lead="The model answers each question several times; a verifier scores the answers; those "
        "better than their siblings become more likely. Nobody shows it a solution.",
        blocks=(Facts(_list_changes(findings)), Charts(tuple(charts))),
    )


def _list_family(
    findings: Findings, prefix: str, known: Mapping[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """Names and colours of the logged metrics that begin with `prefix`, besides those `known`."""
    keys = {key for row in findings.metrics.get("align", ()) for key in row}
    names = sorted(key for key in keys - {*known, "reward/std"} if key.startswith(prefix))
    return {
        name: (name.removeprefix(prefix), color)
        for name, color in zip(names, _FAMILY_COLORS, strict=False)
    }


def _chart_drops(findings: Findings) -> list[Chart]:
    rows = findings.metrics.get("align", ())
    names = sorted({key for row in rows for key in row if key.startswith("dropped/")})
    colors = ("rl", "sft", "base", "ink", "score", "sync")
    series = tuple(
        Series(name.removeprefix("dropped/"), findings.column("align", name), color)
        for name, color in zip(names, colors, strict=False)
    )
    series = tuple(s for s in series if any(y for _, y in s.points))
    if not series:
        return []
    meaning = "Samples not trained on, by reason: for example too old, or their worker died."
    return [Chart("Dropped samples", series, meaning, floor=0.0)]


def _list_changes(findings: Findings) -> tuple[Fact, ...]:
    """First and last value of what matters most."""
    wanted = (
        ("reward/correct", "Correct while sampling", show_percent),
        ("reward/format", "In the asked form", show_percent),
        ("length", "Answer length", lambda v: f"{v:.0f}"),
        ("kl", "KL to the reference", lambda v: show_number(v, 2)),
    )
    facts = []
    for metric, label, show in wanted:
        points = findings.column("align", metric)
        if points:
            value = f"{show(points[0][1])} → {show(points[-1][1])}"
            facts.append(Fact(label, value, "first step → last step"))
    return tuple(facts)


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
        right = [float(c.get("parts", {}).get("correct", 0)) > 0 for c in row["completions"]]
        title = f"Step {step}: {sum(right)} of {len(right)} correct"
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


def _list_attempts(completions: Sequence[Mapping[str, Any]]) -> tuple[Attempt, ...]:
    """The first different texts of a group, each with how often it was written."""
    written: dict[str, list[Mapping[str, Any]]] = {}
    for completion in completions:
        written.setdefault(str(completion["text"]), []).append(completion)
    return tuple(_judge(same[0], len(same)) for same in list(written.values())[:ATTEMPTS_SHOWN])


def _judge(completion: Mapping[str, Any], times: int) -> Attempt:
    parts = completion.get("parts", {})
    right = float(parts.get("correct", 0)) > 0
    notes = [f"{name} {show_number(float(value))}" for name, value in sorted(parts.items())]
    version = completion.get("version")
    if version is not None:
        notes.append(f"v{version}")
    if times > 1:
        notes.append(f"{TIMES}{times}")
    reward = completion.get("reward")
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
