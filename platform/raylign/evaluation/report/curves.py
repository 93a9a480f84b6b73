"""The curves of reinforcement learning: what each step measured, and what that means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylign.evaluation.report.document import Chart, Charts, Fact, Facts, Section, Series
from raylign.evaluation.report.figures import MINUS, show_count, show_number, show_percent
from raylign.evaluation.report.findings import Findings
from raylign.evaluation.report.learning import draw_lines

MISMATCH_BAR = 1e-3


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
        "Agreement of the reward's parts",
        {},
        "Correlation of each part with the reward that is learned, over a step's completions. A "
        "part that falls towards 0, or below, is one that the policy gains reward without.",
        {},
    ),
    (
        "KL to the reference",
        {"kl": ("KL", "rl")},
        "How far the policy has moved from the model it began as. Slow growth is healthy; a sudden "
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
        "Groups and endings",
        {
            "groups/no_spread": ("groups without a difference", "score"),
            "truncated": ("answers cut off", "sft"),
        },
        "Where all answers to a question are worth the same, comparing them teaches nothing; an "
        "answer that was cut off at its longest was not finished.",
        {"unit": "percent", "floor": 0.0},
    ),
    (
        "Loss",
        {"loss": ("loss", "rl")},
        "Near 0, and that is normal: rewards are compared with what was expected, so the ups and "
        "downs cancel. The gradient does the work, not the value.",
        {},
    ),
    (
        "Value function",
        {"value/explained_variance": ("explained variance", "learn")},
        "How much of what answers turned out to be worth the critic had foreseen: 1 is all of it, "
        "0 no more than their mean.",
        {},
    ),
    (
        "Judge",
        {
            "judge/order_consistency": ("same verdict in both orders", "rl"),
            "judge/agreement": ("agreement with itself", "base"),
            "judge/first_rate": ("for the first shown", "score"),
            "judge/abstain_rate": ("no verdict", "sft"),
        },
        "A judge that follows the order in which it sees two answers, or contradicts itself, "
        "rewards chance. For the first shown should be near a half.",
        {"unit": "percent", "floor": 0.0},
    ),
    (
        "Judge's work",
        {
            "judge/calls": ("calls", "learn"),
            "judge/cache_hits": ("from the cache", "rl"),
            "judge/retries": ("asked again", "sft"),
        },
        "Questions to the judge in each step, and those that it had answered before.",
        {"floor": 0.0},
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
_FAMILIES = {
    "Reward": "reward/",
    "Agreement of the reward's parts": "agreement/",
    "Workers": "workers/",
}
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
        lead="The model answers questions, and is told how good each answer is; answers better "
        "than expected become more likely. Nobody shows it a solution.",
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
        ("reward/total", "Reward", show_number),
        ("reward/correct", "Correct while sampling", show_percent),
        ("reward/format", "In the asked form", show_percent),
        ("length", "Answer length", lambda v: f"{v:.0f}"),
        ("entropy", "Entropy", lambda v: show_number(v, 2)),
        ("kl", "KL to the reference", lambda v: show_number(v, 2)),
        ("grad_norm", "Gradient norm", lambda v: show_number(v, 2)),
        ("tokens_per_second", "Tokens a second", show_count),
    )
    facts = []
    for metric, label, show in wanted:
        points = findings.column("align", metric)
        if points:
            value = f"{show(points[0][1])} → {show(points[-1][1])}"
            facts.append(Fact(label, value, "first step → last step"))
    return tuple(facts)
