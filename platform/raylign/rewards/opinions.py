"""What a judge makes of the completions of one prompt: a number each, and who beats whom."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from raylign.config import JudgeConfig
from raylign.rewards.hearing import ABSTAINED, Finding, Hearings, Silence
from raylign.rewards.judging import (
    JudgeTally,
    Pair,
    PairVerdict,
    Preference,
    average_marks,
    choose_pairs,
    list_preferences,
    measure_agreement,
    settle_pair,
    win_shares,
)
from raylign.rewards.rubric import Rubric
from raylign.rewards.verdicts import Verdict, read_choice, read_mark

NO_REFERENCE = "judge has no reference"
ALONE = "judge has nothing to compare with"


@dataclass(frozen=True, slots=True)
class Opinion:
    """Of the completions of one prompt."""

    values: tuple[float | Silence, ...]
    """In their order, in 0..1: mean mark, or share of the wins."""
    preferences: tuple[Preference, ...] = ()
    """compare: the pairs that have a winner."""


class Judge:
    """Forms opinions by asking; a plain object, wherever its model is."""

    def __init__(
        self,
        rubric: Rubric,
        config: JudgeConfig,
        hearings: Hearings,
        tally: JudgeTally,
        controls: Collection[str] = (),
    ) -> None:
        """`controls` are special tokens of the judge's own tokenizer."""
        self._rubric, self._config, self._hearings = rubric, config, hearings
        self._tally, self._controls = tally, tuple(controls)

    async def consider(
        self, prompt: str, completions: Sequence[str], reference: str, seed: int
    ) -> Opinion:
        """An opinion of `completions`; `seed` chooses who meets whom.

        Raises `UserError` when nothing can be asked of this judge at all.
        """
        if self._rubric.needs_reference and not reference:
            return Opinion((Silence(NO_REFERENCE),) * len(completions))
        if self._config.compare:
            return await self._compare(prompt, completions, reference, seed)
        values = await asyncio.gather(
            *(self._score(prompt, completion, reference) for completion in completions)
        )
        return Opinion(tuple(values))

    async def _score(self, prompt: str, completion: str, reference: str) -> float | Silence:
        question = self._rubric.render(prompt, [completion], reference, self._controls)
        read = partial(read_mark, scale=self._config.scale)
        findings = await asyncio.gather(
            *(self._hearings.hear(question, read, n) for n in range(self._config.samples))
        )
        marks = [_value(finding) for finding in findings]
        self._tally.agreement(measure_agreement([mark for mark in marks if mark is not None]))
        mean = average_marks(marks)
        return _explain(findings) if mean is None else mean

    async def _compare(
        self, prompt: str, completions: Sequence[str], reference: str, seed: int
    ) -> Opinion:
        pairs = choose_pairs(len(completions), self._config.pairs, seed)
        settled = await asyncio.gather(
            *(self._settle(prompt, completions, pair, reference) for pair in pairs)
        )
        outcomes = [outcome for outcome, _ in settled]
        values: list[float | Silence] = []
        for place, share in enumerate(win_shares(len(completions), outcomes)):
            if share is not None:
                values.append(share)
                continue
            own = [f for outcome, found in settled if place in outcome.pair for f in found]
            values.append(_explain(own) if own else Silence(ALONE))
        return Opinion(tuple(values), tuple(list_preferences(outcomes)))

    async def _settle(
        self, prompt: str, completions: Sequence[str], pair: Pair, reference: str
    ) -> tuple[PairVerdict, list[Finding]]:
        """The outcome of a pair, and all that was said of it."""
        texts = [completions[place] for place in pair]
        if texts[0] == texts[1]:  # nothing to ask
            return PairVerdict(pair, 0.5, 0, 0, 0, None), []
        orders = [texts, texts[::-1]] if self._config.both_orders else [texts]
        samples = range(self._config.samples)
        questions = [
            self._rubric.render(prompt, order, reference, self._controls) for order in orders
        ]
        found: list[Finding] = await asyncio.gather(
            *(
                self._hearings.hear(question, read_choice, n)
                for question in questions
                for n in samples
            )
        )
        values = [_value(finding) for finding in found]
        for value in values:
            self._tally.choice(value)
        forward, backward = values[: len(samples)], values[len(samples) :]
        outcome = settle_pair(pair, forward, backward if self._config.both_orders else None)
        self._tally.pair(outcome)
        return outcome, found


def _value(finding: Finding) -> float | None:
    return finding.value if isinstance(finding, Verdict) else None


def _explain(findings: Sequence[Finding]) -> Silence:
    """Why there is no verdict: the commonest reason, the first of several; that the judge itself
    abstained when nothing else befell it."""
    silences = [finding for finding in findings if isinstance(finding, Silence)]
    if not silences:
        return Silence(ABSTAINED, "by its own word")
    reason = Counter(silence.reason for silence in silences).most_common(1)[0][0]
    return next(silence for silence in silences if silence.reason == reason)
