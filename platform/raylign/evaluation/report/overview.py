"""The top of the report: headline numbers and the journey through the stages."""

from __future__ import annotations

from raylign.evaluation.report.document import Fact, Hero, Journey, Score, Section, Stop
from raylign.evaluation.report.figures import (
    show_count,
    show_number,
    show_percent,
    show_points,
    show_seconds,
)
from raylign.evaluation.report.findings import STAGES, TITLES, Findings
from raylign.evaluation.tasks import EPISODES

# What the run has come to when nothing is measured yet.
GOALS = {
    "corpus": "a clean corpus",
    "tokenizer": "a tokenizer",
    "shards": "training data",
    "pretrain": "a language model",
    "sft": "an assistant",
    "align": "an aligned assistant",
}


def headline_metric(findings: Findings) -> tuple[str, str] | None:
    """The (task, metric) that the headline speaks of: arithmetic if there, else the first."""
    tasks = findings.results.get("tasks", {})
    for task in sorted(tasks, key=lambda name: name != "arithmetic"):
        for metric in tasks[task]["metric"]:
            if metric.startswith(("exact", "acc")):
                return task, metric
    return None


def list_scores(findings: Findings) -> tuple[Score, ...]:
    """Every model's headline accuracy, with its gain over the model before it."""
    chosen = headline_metric(findings)
    if chosen is None:
        return ()
    scores: list[Score] = []
    for model in findings.results["models"]:
        found = findings.value(*chosen, model)
        if found is None:
            continue
        gain = found["value"] - scores[-1].value if scores else None
        scores.append(Score(model, found["value"], found.get("stderr"), gain))
    return tuple(scores)


def mean_mismatch(findings: Findings) -> float | None:
    """Mean over the steps of the rollout/learner log-probability difference."""
    values = [value for _, value in findings.column("align", "mismatch/mean_abs")]
    return sum(values) / len(values) if values else None


def total_seconds(findings: Findings) -> float | None:
    """Time of the whole journey; the sum of its stages where nobody timed the whole."""
    if "seconds" in findings.journey:
        return float(findings.journey["seconds"])
    times = [t for t in map(findings.seconds, STAGES) if t is not None]
    return sum(times) if times else None


def build_hero(findings: Findings) -> Hero:
    """The headline."""
    scores = list_scores(findings)
    seconds = total_seconds(findings)
    last = show_percent(scores[-1].value) if scores else ""
    made = [goal for stage, goal in GOALS.items() if stage in findings.stages]
    goal = f"{last} correct" if last else made[-1] if made else "nothing yet"
    time = f" in {show_seconds(seconds)}" if seconds is not None else ""
    return Hero(
        eyebrow=f"Raylign · run {findings.name}",
        title=f"From raw text to {goal}{time}",
        lead=_describe_journey(findings),
        scores=scores,
        score_label=_describe_score(findings),
        facts=tuple(_list_facts(findings, seconds)),
    )


def _describe_journey(findings: Findings) -> str:
    acts = {
        "corpus": "raw text is cleaned",
        "tokenizer": "a tokenizer is trained",
        "pretrain": "a language model is pretrained from random weights",
        "sft": "it is taught to answer questions",
        "align": "it improves by reinforcement learning on its own answers",
        "evaluate": "every model is tested on the same held-out problems",
    }
    told = [text for stage, text in acts.items() if stage in findings.stages]
    if not told:
        return "This run has no finished stage yet."
    joined = told[0] if len(told) == 1 else f"{', '.join(told[:-1])}, and {told[-1]}"
    return f"One run, one seed: {joined}."


def _describe_score(findings: Findings) -> str:
    chosen = headline_metric(findings)
    if chosen is None:
        return ""
    task, metric = chosen
    counts = [v["n"] for v in findings.results["tasks"][task]["metric"][metric].values()]
    what = "problems, in episodes" if task == EPISODES else f"{task} problems"
    return f"Correct answers to {max(counts):,} held-out {what}"


def _list_facts(findings: Findings, seconds: float | None) -> list[Fact]:
    facts = []
    if seconds is not None:
        facts.append(Fact("Total time", show_seconds(seconds), "every stage, start to finish"))
    peak = findings.journey.get("peak_memory_gb")
    if peak is not None:
        facts.append(Fact("Peak memory", f"{float(peak):.1f} GB", "all processes together"))
    learning = findings.seconds("align")
    if learning is not None:
        steps = len(findings.metrics.get("align", ()))
        facts.append(Fact("Reinforcement learning", show_seconds(learning), f"{steps} steps"))
    mismatch = mean_mismatch(findings)
    if mismatch is not None:
        note = "mean |Δ log p|, rollout against learner"
        facts.append(Fact("Sampler mismatch", show_number(mismatch, 2), note))
    return facts


def build_journey(findings: Findings) -> Section:
    """The strip of stages."""
    stops = tuple(
        Stop(stage, TITLES[stage], findings.seconds(stage), *_key_number(findings, stage))
        for stage in STAGES
        if stage in findings.stages
    )
    return Section(
        key="journey",
        title="The journey",
        lead="Every stage reads a directory and writes a directory; here is the time each took and "
        "the one number to remember of it.",
        blocks=(Journey(stops),) if stops else (),
    )


def _key_number(findings: Findings, stage: str) -> tuple[str, str]:
    """A stage's figure and what it means."""
    summary = findings.stages[stage].summary
    if stage == "corpus" and findings.funnel.get("steps"):
        steps = findings.funnel["steps"]
        return show_count(steps[-1]["out"]), f"of {show_count(steps[0]['in'])} documents kept"
    if stage == "tokenizer" and findings.vocabulary:
        return show_count(findings.vocabulary), "tokens in the vocabulary"
    if stage == "shards" and findings.shards.get("splits"):
        tokens = sum(split["tokens"] for split in findings.shards["splits"].values())
        return show_count(tokens), "tokens, packed"
    if stage in ("pretrain", "sft"):
        losses = findings.column(stage, "validation_loss") or findings.column(stage, "loss")
        if losses:
            return f"{losses[-1][1]:.3f}", "validation loss at the end"
    if stage == "align":
        rewards = findings.column(stage, "reward/correct") or findings.column(stage, "reward/total")
        if rewards:
            first, last = show_percent(rewards[0][1], 0), show_percent(rewards[-1][1], 0)
            return f"{first} → {last}", "of sampled answers correct"
    if stage == "evaluate":
        scores = list_scores(findings)
        if len(scores) > 1:
            return (
                f"{show_points(scores[-1].value - scores[0].value)}",
                "points, first to last model",
            )
        if scores:
            return show_percent(scores[0].value), "correct"
    for name, value in summary.items():
        if isinstance(value, int | float):
            return show_number(value), name.replace("_", " ")
    return "done", ""
