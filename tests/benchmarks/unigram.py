"""Unigram training here and in the `tokenizers` library: `python tests/benchmarks/unigram.py
FILE [SIZE]`.

The same words, entries and held-out text for both, one thread. Prints CPU seconds, MB of text a CPU
second, bytes per token on text that neither has seen, and whether training twice gave the same
pieces with the same scores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from raylign.tokenization.special import SPECIAL, UNKNOWN
from raylign.tokenization.unigram import _word_pattern, train_unigram


def train_ours(texts: list[str], size: int) -> Tokenizer:
    return train_unigram(texts, size, byte_fallback=False).backend_tokenizer


def train_theirs(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_word_pattern(True)), "isolated")
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def measure(
    name: str, train: Callable[[list[str], int], Tokenizer], texts: list[str], size: int
) -> float:
    """Prints a line; returns CPU seconds of the second training (the first one compiles)."""
    training = [text for place, text in enumerate(texts) if place % 10]
    held = [text for place, text in enumerate(texts) if not place % 10]
    train(training[:50], 200)
    seen, seconds = set(), 0.0
    for _ in range(2):
        started = time.process_time()
        tokenizer = train(training, size)
        seconds = time.process_time() - started
        seen.add(json.dumps(json.loads(tokenizer.to_str())["model"]["vocab"]))
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch_fast(held, add_special_tokens=False))
    rate = sum(len(text.encode()) for text in training) / 1e6 / seconds
    print(
        f"{name:<22} {seconds:6.2f} CPU s  {rate:6.2f} MB/s  "
        f"{sum(len(text.encode()) for text in held) / tokens:.3f} bytes a token  "
        f"{tokenizer.get_vocab_size():,} entries  "
        f"{'the same' if len(seen) == 1 else 'different'} twice"
    )
    return seconds


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    texts = [part + "\n\n" for part in text.split("\n\n")]
    ours = measure("raylign", train_ours, texts, size)
    theirs = measure("tokenizers (library)", train_theirs, texts, size)
    print(f"ratio of CPU seconds: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
