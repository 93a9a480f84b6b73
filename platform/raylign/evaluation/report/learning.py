"""Pretraining and fine-tuning: loss curves, and what the model writes at each checkpoint."""

from __future__ import annotations

from raylign.evaluation.report.document import (
    Block,
    Cell,
    Chart,
    Charts,
    Fact,
    Facts,
    Section,
    Series,
    Table,
    Text,
)
from raylign.evaluation.report.figures import show_count, show_seconds
from raylign.evaluation.report.findings import Findings, Rows

SMOOTH_ABOVE = 80
COLORS = {"pretrain": "base", "sft": "sft", "align": "rl"}

Points = tuple[tuple[float, float], ...]


def smooth(points: Points, width: int) -> Points:
    """Centred moving average over `width` points, narrower at the ends."""
    half = width // 2
    smoothed = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        window = points[i - reach : i + reach + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return tuple(smoothed)


def draw_lines(name: str, points: Points, color: str) -> list[Series]:
    """A series; a long noisy one as its average over the raw values."""
    if len(points) <= SMOOTH_ABOVE:
        return [Series(name, points, color)]
    width = max(5, len(points) // 20)
    return [
        Series(name, points, color, faint=True),
        Series(f"{name}, averaged", smooth(points, width), color),
    ]


def build_learning(findings: Findings) -> Section | None:
    """Loss curves of both supervised stages."""
    charts = []
    meanings = {
        "pretrain": "How surprised the model is by the next token of ordinary text, in nats. "
        "A drop of 0.7 means half the surprise.",
        "sft": "The same measure, on the assistant's words only: nothing is learned from how "
        "users write.",
    }
    titles = {"pretrain": "Pretraining loss", "sft": "Fine-tuning loss"}
    facts: list[Fact] = []
    for stage in ("pretrain", "sft"):
        train = findings.column(stage, "loss")
        if not train:
            continue
        checked = findings.column(stage, "validation_loss")
        series = draw_lines("training", train, COLORS[stage])
        if checked:
            series.append(Series("validation", checked, "ink", dots=True))
        charts.append(Chart(titles[stage], tuple(series), meanings[stage], wide=True))
        facts.extend(_list_facts(findings, stage))
    if not charts:
        return None
    blocks: list[Block] = [Facts(tuple(facts)), Charts(tuple(charts))]
    return Section(
        key="learning",
        title="Learning from text",
        lead="First the model learns to continue text, then to answer questions. Validation text "
        "is never trained on: if its loss rose while training loss fell, the model would be "
        "learning by heart.",
        blocks=tuple(blocks),
    )


def _list_facts(findings: Findings, stage: str) -> list[Fact]:
    name = {"pretrain": "Pretraining", "sft": "Fine-tuning"}[stage]
    facts = []
    rate = [y for _, y in findings.column(stage, "tokens_per_second")]
    steps = len(findings.metrics[stage])
    seconds = findings.seconds(stage)
    if seconds is not None:
        facts.append(Fact(f"{name} time", show_seconds(seconds), f"{steps:,} logged steps"))
    if rate:
        middle = sorted(rate)[len(rate) // 2]
        facts.append(Fact(f"{name} speed", f"{show_count(middle)}/s", "tokens, median step"))
    return facts


def build_samples(findings: Findings) -> Section | None:
    """What the model wrote at each checkpoint, prompt by prompt."""
    blocks: list[Block] = []
    titles = {"pretrain": "While pretraining", "sft": "While fine-tuning"}
    for stage, title in titles.items():
        rows = findings.samples.get(stage, ())
        prompts = list(dict.fromkeys(str(row["prompt"]) for row in rows))
        if not prompts:
            continue
        blocks.append(Text(title, heading=True))
        blocks.append(_tabulate_samples(rows, prompts))
    if not blocks:
        return None
    return Section(
        key="samples",
        title="What it wrote along the way",
        lead="The same prompts, continued greedily at every checkpoint. Read "
        "downwards to watch it learn.",
        blocks=tuple(blocks),
    )


def _tabulate_samples(rows: Rows, prompts: list[str]) -> Table:
    """One row a checkpoint, prompt by prompt."""
    cells = []
    for prompt in prompts:
        found = {int(row["step"]): str(row["text"]) for row in rows if str(row["prompt"]) == prompt}
        for index, (step, text) in enumerate(sorted(found.items())):
            name = prompt.strip() if index == 0 else ""
            written = text.removeprefix(prompt).strip()
            cells.append((Cell(name), Cell(f"{step:,}", tone="muted"), Cell(written, mono=True)))
    return Table(
        head=("Prompt", "Step", "What it wrote"),
        rows=tuple(cells),
        numeric=frozenset({1}),
        narrow=frozenset({0, 1}),
    )
