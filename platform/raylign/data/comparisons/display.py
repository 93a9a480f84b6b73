"""Judged answers token by token, as training sees them."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from raylign.data.comparisons.encoding import WRONG, Compared

_NAMES = {1: ("answer",), 2: ("chosen", "rejected")}
_SIGNS = {0: "", 1: "score", WRONG: "wrong"}


def render_comparison(
    item: Compared, tokenizer: PreTrainedTokenizerBase, at_end: int | None = None
) -> Iterator[tuple[str, bool]]:
    """(line, whether its token is scored): part, place in it, sign, id and text.

    With `at_end`, the padding token, an answer is scored as a whole at its last other token.
    """
    for token in _list(item.prompt.tolist(), tokenizer, "prompt", [""] * len(item.prompt)):
        yield token, False
    for name, answer in zip(_NAMES[len(item.answers)], item.answers, strict=True):
        ids = answer.token_ids.tolist()
        signs = [_SIGNS[mark] for mark in answer.marks.tolist()]
        if at_end is not None:
            last = max((place for place, token in enumerate(ids) if token != at_end), default=0)
            signs = ["score" if place == last else "" for place in range(len(ids))]
        lines = _list(ids, tokenizer, name, signs)
        yield from zip(lines, map(bool, signs), strict=True)


def _list(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, name: str, signs: list[str]
) -> Iterator[str]:
    for place, (token, sign) in enumerate(zip(ids, signs, strict=True)):
        text = tokenizer.decode([token])
        if "\ufffd" in text or not text:  # part of a character
            text = str(tokenizer.convert_ids_to_tokens(token))
        yield f"{name:<8} {place:>5}  {sign:<5}  {token:>7}  {text!r}"
