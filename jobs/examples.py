"""Training examples printed token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from raylign.data.chat import Conversation, find_source
from raylign.data.chat.display import list_tokens, render_tokens


def print_examples(
    examples: Sequence[Conversation],
    data: Path,
    format: str,
    summary: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Print examples that were made of rows of `data`, then the lines of `summary`.

    A trained token's line says `train`, and is bold and green where there are colours.
    """
    console = Console(highlight=False, soft_wrap=True)
    for number, example in enumerate(examples, 1):
        tokens = list_tokens(example, find_source(data, example.row, format), tokenizer)
        console.print(
            Text(
                f"example {number} of {len(examples)}: row {example.row}, {len(tokens)} tokens, "
                f"{int(example.trained.sum())} trained",
                style="bold",
            )
        )
        for line, trained in render_tokens(tokens):
            console.print(Text(line, style="bold green" if trained else ""))
        console.print()
    for line in summary:
        console.print(Text(line))
