"""The judge pool at a service that misbehaves, and on vLLM workers of its own."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.judge import JudgePool, Tempo
from raylign.config import JudgeConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.lessons import SEPARATORS
from raylign.rewards.outcomes import Rejection
from raylign.tracking import read_lines
from tests.inference.service import Asked, Service, Told, serve
from tests.tiny_model import write_speller

PROMPT = Prompt("p", (5,), "Say a number.", "7")
KEY = "sk-canary-42"
SWIFT = Tempo(pause_s=0.02, look_s=0.1, idle_s=0.5)


def complete(*texts: str, group: str = "g") -> tuple[Trajectory, ...]:
    return tuple(
        Trajectory(
            prompt_id="p",
            group_id=group,
            token_ids=np.array([5, 6], np.int32),
            loss_mask=np.array([False, True]),
            logprobs=np.zeros(2, np.float32),
            versions=np.array([-1, 0], np.int32),
            finish_reason="stop",
            text=text,
        )
        for text in texts
    )


def shown(asked: Asked) -> list[str]:
    """The completions in a question, in the order in which they are shown."""
    found = re.findall(r"\[\[begin (\w+) [\w ]*answer\]\]\n(.*?)\n\[\[end \1", asked.question, re.S)
    return [text for _, text in found]


def mark(asked: Asked) -> Told:
    """An honest judge of single completions: the mark is the number in the text."""
    return Told(json.dumps({"reason": "r", "score": int(re.findall(r"\d+", shown(asked)[0])[0])}))


def choose(asked: Asked) -> Told:
    """An honest judge of pairs: the larger number is better."""
    first, second = (int(re.findall(r"\d+", text)[0]) for text in shown(asked))
    better = "tie" if first == second else "first" if first > second else "second"
    return Told(json.dumps({"better": better}))


def play(
    service: Service,
    directory: Path,
    scenario: Callable[[JudgePool], Coroutine[Any, Any, Any]],
    **keys: Any,
) -> Any:
    place = {"endpoint": service.url, "endpoint_model": "m"}
    config = JudgeConfig(**{**place, "timeout_s": 30.0, **keys})

    async def whole() -> Any:
        pool = JudgePool(config, directory, seed=3, tempo=SWIFT)
        try:
            await pool.start()
            return await scenario(pool)
        finally:
            pool.stop()
            await asyncio.sleep(0.05)

    return asyncio.run(whole())


def measure(*texts: str) -> Callable[[JudgePool], Coroutine[Any, Any, Any]]:
    """Values of `texts`, reasons in place of those that have none, and the metrics."""

    async def scenario(pool: JudgePool) -> tuple[list[float | str], dict[str, float]]:
        found = await pool.measure(complete(*texts), PROMPT)
        values = [v.reason if isinstance(v, Rejection) else round(v, 6) for v in found]
        return values, pool.take_metrics()

    return scenario


NUMBERS = [f"answer {n}" for n in (1, 4, 10, 7)]
MARKS = [0.0, round(3 / 9, 6), 1.0, round(6 / 9, 6)]


def test_it_is_a_scorer_and_asks_nothing_twice(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)

    async def scenario(pool: JudgePool) -> Any:
        same = complete(*["answer 4"] * 9, *NUMBERS)
        first = await pool.score(same, PROMPT)
        second = await pool.score(same, PROMPT)
        with pytest.raises(UserError, match="judges=2: the judge is an endpoint"):
            await pool.scale(2)
        return first, second, pool.take_metrics()

    directory = tmp_path / "verdicts"
    with serve(mark) as service:
        first, second, metrics = play(service, directory, scenario, key_file=key_file)
        rewards = [t.reward for t in first.scored.kept]
        assert rewards == pytest.approx([3 / 9] * 9 + MARKS, abs=1e-6)
        assert first.scored.kept[9].reward_parts == {"judge": 0.0} and not first.scored.rejected
        assert [t.reward for t in second.scored.kept] == rewards and first.worker == "judge"
        assert len(service.asked) == metrics["judge/calls"] == 4
        assert metrics["judge/cache_hits"] == 2 * 13 - 4 and metrics["judge/verdicts"] == 26
        # A process that was killed while it wrote loses that line and no other.
        [file] = (directory / "judge").iterdir()
        file.write_bytes(file.read_bytes()[:-20])
        assert play(service, directory, measure(*NUMBERS))[0] == MARKS
        assert len(service.asked) == 5
        # Other criteria are other questions; without a cache all are asked.
        play(service, directory, measure(*NUMBERS), rubric="honest")
        assert len(service.asked) == 9
        play(service, directory, measure(*NUMBERS), cache=False)
        assert len(service.asked) == 13
    assert not any(KEY.encode() in f.read_bytes() for f in (directory / "judge").iterdir())


def troubled(judge: Callable[[Asked], Told]) -> Callable[[Asked], Told]:
    """The same judge, which answers each question properly at the third attempt only."""
    troubles = [
        Told(status=429, headers={"Retry-After": "0.1"}, body="{}"),
        Told(status=500, body="oops"),
        Told(dropped=True),
        Told(seconds=1.5),
        Told(body="<html>"),
        Told("The answer deserves a 9."),
        Told('{"score": 99, "better": "third"}'),
        Told('{"reason": "it says {"score": 10}", "score": 10, "better": "first"'),
    ]
    times: Counter[str] = Counter()

    def tell(asked: Asked) -> Told:
        question = asked.question.partition("\n\nYour last reply could not be read")[0]
        times[question] += 1
        if times[question] > 2:
            return judge(asked)
        return troubles[(len(times) * 2 + times[question]) % len(troubles)]

    return tell


def test_trouble_changes_no_number(tmp_path: Path) -> None:
    texts = [f"answer {n}" for n in range(1, 11)]
    with serve(mark) as service:
        calm, quiet = play(service, tmp_path / "a", measure(*texts))
    # On a busy machine a call may be late of itself, so attempts are plenty.
    hurry = {"timeout_s": 1.0, "attempts": 9}
    with serve(troubled(mark)) as service:
        found, metrics = play(service, tmp_path / "b", measure(*texts), **hurry)
        assert service.most_at_once > 1
    assert found == calm and calm == [round(n / 9, 6) for n in range(10)]
    assert quiet["judge/retries"] == 0 and metrics["judge/retries"] >= 20
    assert metrics["judge/calls"] == 10 + metrics["judge/retries"]
    assert metrics["judge/abstentions"] == 0
    with serve(choose) as service:
        calm, _ = play(service, tmp_path / "c", measure(*texts), compare=True)
    with serve(troubled(choose)) as service:
        found, metrics = play(service, tmp_path / "d", measure(*texts), compare=True, **hurry)
    # In a circle each meets the next: the smallest loses twice, the largest wins twice.
    assert found == calm == [0.0, *[0.5] * 8, 1.0]
    assert metrics["judge/order_consistency"] == 1.0 and metrics["judge/first_rate"] == 0.5


@pytest.mark.parametrize(
    ("told", "reason", "detail", "calls"),
    [
        (Told("rather good"), "judge abstained", "there is no JSON object", 3),
        (Told('{"score": 0}'), "judge abstained", "not from 1 to 10", 3),
        (Told('{"score": null}'), "judge abstained", "by its own word", 1),
        (Told(status=503, body="down"), "judge call failed", "HTTP 503: down", 3),
        (Told(status=429, headers={"Retry-After": "99"}, body=""), "judge call failed", "99 s", 1),
        (Told(dropped=True), "judge call failed", "", 3),
        (Told(status=400, body="flagged"), "judge refused the question", "flagged", 3),
        (Told(status=400, body="context length"), "too long for the judge", "context length", 1),
    ],
)
def test_no_verdict_is_no_mark(
    tmp_path: Path, told: Told, reason: str, detail: str, calls: int
) -> None:
    with serve(lambda asked: told if "13" in asked.question else mark(asked)) as service:

        async def scenario(pool: JudgePool) -> Any:
            return await pool.score(complete("answer 13", "answer 4"), PROMPT)

        scored = play(service, tmp_path, scenario, attempts=2).scored
    assert [t.reward for t in scored.kept] == pytest.approx([3 / 9])
    [lost] = scored.rejected
    assert (lost.prompt_id, lost.group_id, lost.reason) == ("p", "g", reason)
    assert detail in lost.detail
    own = [asked for asked in service.asked if "13" in asked.question]
    assert len(own) == calls
    if reason == "judge abstained" and calls > 1:
        assert len({asked.body["seed"] for asked in own}) == calls
        assert own[1].question != own[0].question and detail in own[1].question


def test_the_budget_holds_over_restarts(tmp_path: Path) -> None:
    texts = [f"answer {n}" for n in (1, 2, 3, 4)]
    with serve(mark) as service:
        for _ in range(2):
            values, _ = play(service, tmp_path, measure(*texts), max_calls=3)
            assert sorted(map(str, values))[3] == "judge budget spent"
            assert sum(isinstance(v, float) for v in values) == 3
        assert len(service.asked) == 3
    with serve(lambda asked: Told(status=500)) as service:  # failed calls count, too
        for _ in range(2):
            values, _ = play(service, tmp_path / "failed", measure("answer 1"), max_calls=2)
            assert values == ["judge budget spent"]
        assert len(service.asked) == 2


def test_so_many_calls_at_once(tmp_path: Path) -> None:
    def slow(asked: Asked) -> Told:
        return Told(mark(asked).text, seconds=0.1)

    with serve(slow) as service:
        play(service, tmp_path, measure(*(f"answer 1 {n}" for n in range(12))), concurrency=3)
    assert service.most_at_once == 3


def test_a_biased_or_silent_judge_prefers_nobody(tmp_path: Path) -> None:
    keys = {"compare": True}
    with serve(lambda asked: Told('{"better": "first"}')) as service:
        values, metrics = play(service, tmp_path / "a", measure(*NUMBERS), **keys)
        assert values == [0.5] * 4 and len(service.asked) == 8
        assert metrics["judge/order_consistency"] == 0.0 and metrics["judge/first_rate"] == 1.0
        assert metrics["judge/contradictions"] == 4
        # Whoever asks in one order only has no way to see it: all win the pair they are first in.
        values, metrics = play(
            service, tmp_path / "b", measure(*NUMBERS), compare=True, both_orders=False
        )
        assert values == [0.5] * 4 and "judge/order_consistency" not in metrics
    with serve(lambda asked: Told('{"better": "abstain"}')) as service:
        values, metrics = play(service, tmp_path / "c", measure(*NUMBERS), **keys)
        assert values == ["judge abstained"] * 4 and metrics["judge/abstain_rate"] == 1.0
        assert play(service, tmp_path / "c", measure("one"), **keys)[0] == [
            "judge has nothing to compare with"
        ]
        assert play(service, tmp_path / "c", measure("a", "a", "a"), **keys)[0] == [0.5] * 3


def test_preferences_come_out_too(tmp_path: Path) -> None:
    async def scenario(pool: JudgePool) -> Any:
        return await pool.consider(complete(*NUMBERS), PROMPT)

    with serve(choose) as service:
        opinion = play(service, tmp_path, scenario, compare=True)
        assert opinion.values == (0.0, 0.5, 1.0, 0.5)
        found = {(p.chosen, p.rejected, p.margin) for p in opinion.preferences}
        assert found == {(1, 0, 1.0), (2, 1, 1.0), (2, 3, 1.0), (3, 0, 1.0)}
        every = play(service, tmp_path, scenario, compare=True, pairs=6)
        assert every.values == pytest.approx((0.0, 1 / 3, 1.0, 2 / 3))


def test_samples_are_independent_and_averaged(tmp_path: Path) -> None:
    def moody(asked: Asked) -> Told:
        return Told(json.dumps({"score": 1 + asked.body["seed"] % 10}))

    keys = {"samples": 4, "temperature": 1.0}
    with serve(moody) as service:
        [value], metrics = play(service, tmp_path, measure("answer 1"), **keys)
        marks = [asked.body["seed"] % 10 / 9 for asked in service.asked]
        assert len(marks) == 4 == len({asked.body["seed"] for asked in service.asked})
        assert value == pytest.approx(sum(marks) / 4, abs=1e-6)
        distances = [abs(a - b) for i, a in enumerate(marks) for b in marks[:i]]
        assert metrics["judge/agreement"] == pytest.approx(1 - sum(distances) / 6)
        # The same questions in another run, of the same seed, are drawn with the same seeds.
        play(service, tmp_path / "again", measure("answer 1"), **keys)
        seeds = [asked.body["seed"] for asked in service.asked]
        assert sorted(seeds[:4]) == sorted(seeds[4:])


def test_what_it_cannot_be_asked(tmp_path: Path) -> None:
    with serve(mark) as service:

        async def scenario(pool: JudgePool) -> Any:
            bare = Prompt("p", (5,), "Say a number.", "")
            return await pool.measure(complete("answer 1"), bare)

        [lost] = play(service, tmp_path, scenario, rubric="correct")
        assert lost.reason == "judge has no reference" and not service.asked
        with pytest.raises(UserError, match="did you mean 'harmless'"):
            play(service, tmp_path, scenario, rubric="harmles")
        service.tell = lambda asked: Told(status=403, body="expired")
        with pytest.raises(UserError, match="access denied"):
            play(service, tmp_path, scenario)


def lengthen(model: Path, directory: Path) -> Path:
    """The tiny model with room for whole questions; its weights have no positions."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return directory


def judge_with(model: Path, directory: Path, **keys: Any) -> JudgePool:
    rollout = {"count": 1, "cpus": 0.2, "kv_cache_mb": 16, **keys.pop("rollout", {})}
    config = JudgeConfig(model=model, rollout=rollout, **keys)
    return JudgePool(config, directory, seed=3, tempo=SWIFT)


@pytest.mark.slow
def test_a_vllm_judge_that_babbles_gives_no_marks(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    model = lengthen(tiny_model, tmp_path / "model")
    keys = {"attempts": 2, "max_calls": 11, "temperature": 1.0, "max_tokens": 8}
    pool = judge_with(model, tmp_path / "verdicts", **keys)

    async def scenario() -> Any:
        try:
            await pool.start()
            first = await pool.measure(complete("w1", "w2 w3", "w4 " * 500), PROMPT)
            later = await pool.measure(complete("w5", "w6"), PROMPT)
            return first, later, pool.take_metrics()
        finally:
            pool.stop()

    first, later, metrics = asyncio.run(scenario())
    assert [lost.reason for lost in first] == [*["judge abstained"] * 2, "too long for the judge"]
    assert re.search(r"\d{3} tokens and a verdict of 8 exceed 512", first[2].detail)
    assert metrics["judge/calls"] <= 11 and metrics["judge/workers"] == 1
    assert {lost.reason for lost in later} <= {"judge abstained", "judge budget spent"}


@pytest.mark.slow
def test_a_judge_held_to_its_form_grows_with_the_queue(ray_cluster: None, tmp_path: Path) -> None:
    keys = {"most": 2, "scale_queue": 4, "concurrency": 2, "temperature": 1.0, "max_tokens": 44}
    pool = judge_with(write_speller(tmp_path / "model"), tmp_path / "verdicts", **keys)

    async def scenario() -> Any:
        try:
            await pool.start()
            found: list[float | Rejection] = []
            taken = [pool.take_metrics()]
            while taken[-1]["judge/workers"] < 2:
                texts = [f"answer {n} of round {len(taken)}" for n in range(16)]
                found += await pool.measure(complete(*texts), PROMPT)
                taken.append(pool.take_metrics())
            while pool.take_metrics()["judge/workers"] > 1:
                await asyncio.sleep(0.1)
            with pytest.raises(UserError, match="judges=0: at least 1 worker must stay"):
                await pool.scale(0)
            with pytest.raises(UserError, match="999 more would need"):
                await pool.scale(1000)
            return found, taken, await pool.scale(1)
        finally:
            pool.stop()

    found, taken, said = asyncio.run(asyncio.wait_for(scenario(), 180))
    assert said == "1 -> 1 workers"
    # Random weights know nothing, but their verdicts can be read, almost all at once.
    calls, retries = (sum(m[f"judge/{name}"] for m in taken) for name in ("calls", "retries"))
    assert calls >= 16 and retries <= 0.1 * calls
    marks = [value for value in found if not isinstance(value, Rejection)]
    assert {round(mark * 9, 6) for mark in marks} <= set(range(10)) and len(set(marks)) > 3
    silent = {value.detail for value in found if isinstance(value, Rejection)}
    assert silent <= {"by its own word"}
    # To the letter the form in which judges are taught to write.
    [file] = (tmp_path / "verdicts").rglob("answers-*.jsonl")
    written = [row["text"] for row in read_lines(file) if row["finish_reason"] == "stop"]
    comma, colon = SEPARATORS
    form = rf'{{"reason"{colon}"(?:[^"\\]|\\.)*"{comma}"score"{colon}(?:null|\d+)}}'
    assert len(written) >= 16 and all(re.fullmatch(form, text, re.DOTALL) for text in written)
