"""What the jobs that learn from judged answers do alike: read, split, write, and show rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jobs.entry import locate
from raylign.config import ComparisonConfig, UserError
from raylign.data.comparisons import (
    Compared,
    Comparisons,
    Wanted,
    read_comparisons,
    require_enough,
    write_rejections,
)
from raylign.data.comparisons.display import render_comparison
from raylign.data.preferences import Kind
from raylign.models.loading import load_config
from raylign.models.windows import goes_by_masks
from raylign.run import Draft, Run, hash_json
from raylign.runtime import derive_seed
from raylign.tracking import METRICS_FILE, ProgressBoard, read_lines
from raylign.training.compared_rows import add_strangers, write_compared

ROWS = ".rows"
REJECTED_FILE = "rejected.jsonl"


@dataclass(frozen=True, slots=True)
class Source:
    """A stage's data, and how it is read."""

    stage: str
    config: ComparisonConfig
    kind: Kind
    file: Path
    separator: str = "\n"
    strangers: bool = False
    """kto: put the answer to another prompt behind each."""

    def read(self, tokenizer: PreTrainedTokenizerBase) -> Comparisons:
        """The comparisons, however many rows cannot be used."""
        config = self.config
        wanted = Wanted(
            self.kind, self.stage, config.max_length, config.too_long, config.format, self.separator
        )
        return read_comparisons(self.file, tokenizer, wanted)


PAIRS_STAGE, PAIRS_FILE = "comparisons", "pairs.jsonl"


def locate_data(run: Run, given: Path | None, stage: str) -> tuple[Path, str]:
    """The file of judged answers and its content hash; raises `UserError` when there is none."""
    if given is None:
        found = run.find(PAIRS_STAGE)
        if found is None:
            raise UserError(
                f"{stage}.data is not given; name a file of judged answers, or make some with "
                "`python -m jobs.compare`"
            )
        return found.path / PAIRS_FILE, found.manifest.content
    return locate(run, given, stage, stage, f"{stage}.data")


def check(
    config: ComparisonConfig, stage: str, model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Model, tokenizer and rows must fit each other; raises `UserError`."""
    shape = load_config(model)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the tokenizer of {model} has {len(tokenizer)} entries and its model "
            f"{shape.vocab_size}; {stage}.model must name a directory whose parts fit"
        )
    if config.max_length > shape.max_position_embeddings:
        raise UserError(
            f"{stage}.max_length={config.max_length} exceeds the context of {model}, "
            f"{shape.max_position_embeddings} tokens; lower it"
        )


def may_share_prompts(config: ComparisonConfig, model: Path) -> bool:
    """Whether two answers may stand behind one prompt, which takes a mask of their own."""
    return config.peft not in ("prefix", "prompt") and goes_by_masks(load_config(model))


def prepare_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    draft: Draft,
    board: ProgressBoard,
) -> str:
    """Tokenise, split off the validation share, and write both parts; a hash of their tokens."""
    config, stage = source.config, source.stage
    found = source.read(tokenizer)
    write_rejections(found.rejected, draft.path / REJECTED_FILE)
    require_enough(source.file, found, config.max_rejected_share, stage)
    parts = split(found.items, config.validation_share, seed, stage)
    hashes = []
    for name, part in zip(("train", "validation"), parts, strict=True):
        laid = add_strangers(part, config.max_length) if source.strangers else part
        hashes.append(write_compared(laid, draft.path / ROWS, name))
    draft.summary.update(
        format=found.format,
        rows=len(parts[0]),
        validation_rows=len(parts[1]),
        truncated=found.truncated,
        rejected=len(found.rejected),
        rejected_reasons=dict(Counter(each.reason for each in found.rejected)),
    )
    for line in describe(found):
        board.say(f"  {line}")
    return hash_json(hashes)


def describe(found: Comparisons) -> list[str]:
    """What was found in the data, in lines."""
    tokens = sum(item.longest for item in found.items)
    lines = [f"{found.rows:,} rows ({found.format}), about {tokens / len(found.items):.0f} tokens"]
    if len(found.items) > found.rows:
        lines.append(f"each pair taken as a good answer and a bad one: {len(found.items):,}")
    if found.truncated:
        lines.append(f"{found.truncated:,} cut at max_length")
    return lines + [f"left out: {line}" for line in found.describe()]


def split(
    items: Sequence[Compared], share: float, seed: int, stage: str
) -> tuple[list[Compared], list[Compared]]:
    """(train, validation), drawn by seed; both keep at least one row, and what comes of a row stays
    together. Raises `UserError` for fewer than two rows."""
    rows = list(dict.fromkeys(item.row for item in items))
    if len(rows) < 2:
        raise UserError(f"{stage}.data holds one usable row; validation needs a second one")
    held = min(len(rows) - 1, max(1, round(share * len(rows))))
    drawn = random.Random(derive_seed(seed, stage, "validation")).sample(range(len(rows)), held)
    chosen = {rows[index] for index in drawn}
    parts: tuple[list[Compared], list[Compared]] = ([], [])
    for item in items:
        parts[item.row in chosen].append(item)
    return parts


def print_examples(
    count: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    at_end: int | None = None,
) -> None:
    """`--show COUNT`: the first training examples token by token, and what became of every row."""
    if not count.isdecimal():
        raise UserError(f"--show {count}: give the number of examples, like --show 3")
    found, config = source.read(tokenizer), source.config
    console = Console(highlight=False, soft_wrap=True)
    if found.rows:
        examples = list(found.items)
        if found.rows > 1:
            examples, _ = split(found.items, config.validation_share, seed, source.stage)
        examples = examples[: int(count)]
        for number, item in enumerate(examples, 1):
            title = f"example {number} of {len(examples)}: row {item.row}, {item.longest} tokens"
            if source.kind != "steps":
                title += f", {'margin' if source.kind == 'pairs' else 'label'} {item.value:g}"
            console.print(Text(title, style="bold"))
            for line, scored in render_comparison(item, tokenizer, at_end):
                console.print(Text(line, style="bold green" if scored else ""))
            console.print()
        for line in describe(found):
            console.print(Text(line))
    require_enough(source.file, found, config.max_rejected_share, source.stage)
    split(found.items, config.validation_share, seed, source.stage)  # training would say so too


def show(draft: Draft, board: ProgressBoard) -> None:
    """Accuracy on held-out rows, into the summary and onto the board."""
    rows = read_lines(draft.path / METRICS_FILE)
    names = ("validation_rewards/accuracy", "validation_accuracy", "validation_rewards/margin")
    last: dict[str, float] = {}
    for row in rows:
        last |= {name: row[name] for name in names if name in row}
    accuracy = last.get(names[0], last.get(names[1]))
    margin = last.get(names[2])
    draft.summary.update(validation_accuracy=accuracy, validation_margin=margin)
    if accuracy is not None:
        more = "" if margin is None else f", by a margin of {margin:.3f}"
        board.say(f"  {accuracy:.1%} of what was held out is judged as it should be{more}")
