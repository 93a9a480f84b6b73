"""Which outputs are documents, and every reason why the others are not."""

from __future__ import annotations

import re

import numpy as np
import xxhash

from raylign.config.synthesis import OutputFilterConfig
from raylign.data.synthesis.answers import Answer
from raylign.data.synthesis.forms import FORMS, unwrap_code
from raylign.data.words import split_words

PROMPT_TOO_LONG = "prompt_too_long"
"""Finish reason of a request that was not made: prompt and answer do not fit the context."""

REASONS = {
    PROMPT_TOO_LONG: "prompt and longest answer exceed the context",
    "aborted": "the answer was not finished",
    "cut_off": "the answer reached sampling.max_tokens",
    "empty": "nothing but white space or an unfinished thought",
    "too_short": "fewer than min_chars characters",
    "too_long": "more than max_chars characters",
    "refusal": "begins by refusing",
    "preamble": "begins by talking about the task",
    "repeated_lines": "above max_line_repeat_share",
    "repeated_ngrams": "above max_ngram_repeat_share",
    "copies_prompt": "above max_prompt_share",
    "not_questions": "not questions, each with its answer",
    "not_worked": "not exercises, each with its solution",
    "not_python": "no code that parses and defines a documented function",
    "duplicate": "an earlier output was the same",
}
"""Every reason, in the order in which they are listed, and what it means."""

_THOUGHT = re.compile(r"\A\s*<think>.*?(</think>|\Z)", re.DOTALL)
_REFUSAL = re.compile(
    r"\W*(?:(?:i\s?['\u2019]?a?m\s+(?:\w+\s+)?sorry|sorry,|i\s+apologi[sz]e)\b"
    r"|i\s+(?:can\s?not|can['\u2019]t|won['\u2019]t|am\s+(?:not\s+able|unable)|do\s+not\s+have)\b"
    r"|i['\u2019]m\s+(?:not\s+able|unable)\b"
    r"|(?:unfortunately|regrettably),?\s+i\b"
    r"|as\s+an?\s+(?:ai|artificial|large\s+language|language)\b)",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"\W*(?:(?:sure|certainly|of\s+course|absolutely|gladly|okay|ok|great\s+question)\s*[,!.:\u2014-]"
    r"|(?:here(?:\s+is|\s+are|['\u2019]s)|below\s+is|below\s+are)\b[^\n]{0,160}:[*_\s]*(?:\n|\Z))",
    re.IGNORECASE,
)


def read_answer(answer: Answer, form: str) -> str:
    """The document in an answer: without white space around it, a leading thought, or the fence
    around code that is all there is."""
    text = _THOUGHT.sub("", answer.text)
    return unwrap_code(text.strip()) if form == "python" else text.strip()


class OutputFilter:
    """Judges outputs in their order; keeps hashes of the accepted ones."""

    def __init__(self, config: OutputFilterConfig) -> None:
        self._config = config
        self._seen: set[bytes] = set()

    def judge(self, text: str, finish_reason: str, prompt: str, form: str) -> list[str]:
        """Every reason against an output, in the order of `REASONS`; empty when it is accepted.

        `text` is what `read_answer` gives. A text that is rejected is no reason against a copy.
        """
        config = self._config
        if finish_reason == PROMPT_TOO_LONG:
            return [PROMPT_TOO_LONG]
        found = {
            "aborted": finish_reason not in ("stop", "length"),
            "cut_off": config.finished and finish_reason == "length",
            "empty": not text,
            "too_short": len(text) < config.min_chars,
            "too_long": len(text) > config.max_chars,
            "refusal": config.openers and _REFUSAL.match(text) is not None,
            "preamble": config.openers and _PREAMBLE.match(text) is not None,
            "repeated_lines": line_repeat_share(text) > config.max_line_repeat_share,
            "repeated_ngrams": ngram_repeat_share(text) > config.max_ngram_repeat_share,
            "copies_prompt": prompt_share(text, prompt) > config.max_prompt_share,
            f"not_{form}": config.answers and not FORMS[form](text),
        }
        reasons = [reason for reason in REASONS if found.get(reason)]
        if not reasons and config.duplicates:
            key = xxhash.xxh3_128_digest(" ".join(text.lower().split()).encode())
            if key in self._seen:
                return ["duplicate"]
            self._seen.add(key)
        return reasons


def line_repeat_share(text: str) -> float:
    """Non-empty lines that repeat an earlier one, among all non-empty lines."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def ngram_repeat_share(text: str, n: int = 5) -> float:
    """Word n-grams that occurred before in the text, among all its word n-grams."""
    grams = _hash_ngrams(text, n)
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def prompt_share(text: str, prompt: str, n: int = 8) -> float:
    """Word n-grams of the text that stand in the prompt too, among all its word n-grams."""
    grams = _hash_ngrams(text, n)
    return float(np.isin(grams, _hash_ngrams(prompt, n)).mean()) if len(grams) else 0.0


def _hash_ngrams(text: str, n: int) -> np.ndarray:
    """uint64 [words - n + 1]"""
    words = split_words([text]).hashes
    if len(words) < n:
        return np.empty(0, np.uint64)
    value = np.zeros(len(words) - n + 1, np.uint64)
    for place in range(n):
        value = value * np.uint64(0x9E3779B97F4A7C15) + words[place : len(words) - n + 1 + place]
    return value
