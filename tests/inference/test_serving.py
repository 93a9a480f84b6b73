"""The loop shares one generator among callers, and lets nothing out that was not proved."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from raylign.inference.episode import Episode, Reply
from raylign.inference.generator import Generator, Sample, Sampling, build_generator
from raylign.inference.serving import GeneratorLoop, Request

GREEDY = Sampling(temperature=0.0, max_tokens=6)


@pytest.fixture
def loop(tiny_model: Path) -> GeneratorLoop:
    generator = build_generator(
        "transformers",
        tiny_model,
        dtype="float32",
        max_length=64,
        kv_cache_mb=16,
        max_sequences=8,
        threads=1,
        seed=0,
    )
    loop = GeneratorLoop(generator)
    yield loop
    loop.close()


def ask(loop: GeneratorLoop, prompt: tuple[int, ...], sampling: Sampling = GREEDY) -> Future:
    [future] = loop.submit([Request(prompt, sampling)])
    return future


def test_many_threads_get_their_own_answers(loop: GeneratorLoop) -> None:
    prompts = [(5 + i % 7, 9, 11) for i in range(24)]
    alone = {p: ask(loop, p).result(30)[0].listing() for p in set(prompts)}
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda p: ask(loop, p).result(30)[0], prompts))
    assert [episode.listing() for episode in together] == [alone[p] for p in prompts]


def test_a_prompt_that_does_not_fit_fails_alone(loop: GeneratorLoop) -> None:
    long = ask(loop, tuple(range(4, 80)))
    fine = ask(loop, (5, 6))
    with pytest.raises(ValueError, match="76 tokens; the context holds 64"):
        long.result(30)
    assert fine.result(30)


def test_sampling_that_cannot_be_served_fails_alone(loop: GeneratorLoop) -> None:
    odd = loop.submit([Request((5, 6), replace(GREEDY, schema="{}"), 3)])[0]
    fine = ask(loop, (5, 6))
    with pytest.raises(ValueError, match="schema"):
        odd.result(30)
    assert fine.result(30)


def test_calls_run_in_the_generator_thread_between_steps(loop: GeneratorLoop) -> None:
    assert loop.call(lambda g: threading.current_thread().name).result(30) == "generator"
    assert loop.call(lambda g: g.version).result(30) == 0


def test_after_a_failed_call_nothing_is_served(loop: GeneratorLoop) -> None:
    started, go = threading.Event(), threading.Event()

    def spoil(generator: Generator) -> None:
        started.set()
        go.wait(30)
        raise RuntimeError("half loaded")

    failed = loop.call(spoil)
    started.wait(30)
    waiting = ask(loop, (5, 6))  # arrives while the update fails
    go.set()
    with pytest.raises(RuntimeError, match="half loaded"):
        failed.result(30)
    with pytest.raises(RuntimeError, match="half loaded"):
        waiting.result(30)
    with pytest.raises(RuntimeError, match="half loaded"):
        ask(loop, (5, 6)).result(30)


def test_closing_fails_what_still_waits(loop: GeneratorLoop) -> None:
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        ask(loop, (5, 6)).result(30)


class Echo:
    """Answers each turn with its own last token and 5, three times; `odd` in the second place."""

    def __init__(self, odd: int = 5) -> None:
        self.heard: list[Sample] = []
        self._odd = odd

    def reply(self, turn: Sample) -> Reply:
        self.heard.append(turn)
        if len(self.heard) == 3:
            return Reply(None, reward=1.0)
        second = self._odd if len(self.heard) == 2 else 5
        return Reply((turn.token_ids[-1], second), reward=0.25)


SEEDED = Sampling(max_tokens=4, seed=3)


def test_turns_and_answers_stand_in_one_sequence(loop: GeneratorLoop) -> None:
    request = Request((5, 6), SEEDED, 2, respond=Echo)
    [future] = loop.submit([request])
    [ordered] = loop.submit([request], ordered=True)
    for episode, other in zip(future.result(30), ordered.result(30), strict=True):
        assert len(episode.turns) == 3 and episode.reward == 1.5
        said = [list(turn.token_ids) for turn in episode.turns]
        assert episode.listing() == [*said[0], said[0][-1], 5, *said[1], said[1][-1], 5, *said[2]]
        assert other.listing() == episode.listing()
        assert other.finish_reason == episode.finish_reason == episode.turns[2].finish_reason
    assert len({tuple(e.listing()) for e in future.result()}) == 2


def test_an_episode_ends_with_its_context(loop: GeneratorLoop) -> None:
    long = Sampling(max_tokens=58, seed=1)
    [future] = loop.submit([Request((5, 6), long, respond=Echo)])
    [episode] = future.result(30)
    assert episode.finish_reason == "length"
    assert 2 + len(episode.listing()) <= 64


def take(loop: GeneratorLoop, request: Request, steps: int) -> tuple[Episode, ...]:
    """What is there of a request after so many steps."""
    ready = threading.Event()

    def run(generator: Generator) -> None:
        ready.wait(30)

    held = loop.call(run)
    before = loop.steps
    [future] = loop.submit([request])
    ready.set()
    held.result(30)
    while loop.steps < before + steps and not future.done():
        pass
    [episodes] = loop.withdraw([future]).result(30)
    assert episodes is not None and future.cancelled()
    return episodes


def test_an_episode_goes_on_where_it_was_taken_back(loop: GeneratorLoop) -> None:
    begun = take(loop, Request((5, 6), SEEDED, 2, respond=Echo), 2)
    assert any(episode.turns for episode in begun)
    [future] = loop.submit([Request((5, 6), SEEDED, 2, respond=Echo, begun=begun)])
    for before, after in zip(begun, future.result(30), strict=True):
        assert after.listing()[: len(before.listing())] == before.listing()
        assert len(after.turns) == 3 and after.reward == 1.5


def test_an_episode_that_is_answered_differently_starts_over(loop: GeneratorLoop) -> None:
    [whole] = loop.submit([Request((5, 6), SEEDED, respond=Echo)])
    [episode] = whole.result(30)
    strange = replace(episode.turns[0], token_ids=(9, 9, 9, 9))
    replies = (Reply((9, 5), 0.25), episode.replies[1])
    begun = (Episode((strange, episode.turns[1]), replies),)
    [same] = loop.submit([Request((5, 6), SEEDED, respond=Echo, begun=begun)])
    assert same.result(30)[0].turns[0] is strange
    [future] = loop.submit([Request((5, 6), SEEDED, respond=lambda: Echo(7), begun=begun)])
    [other] = future.result(30)
    assert other.turns[0].token_ids == episode.turns[0].token_ids
    assert other.replies[1].tokens == (other.turns[1].token_ids[-1], 7)
    assert len(other.turns) == 3


def test_completions_start_over_when_asked_to(loop: GeneratorLoop) -> None:
    first = loop.submit([Request((5, 6, 7), Sampling(max_tokens=40, seed=5), 2)])[0]

    def renew(generator: Generator) -> None:
        generator.version = 1  # type: ignore[misc]

    loop.call(renew, restart=True).result(30)
    for episode in first.result(30):
        assert episode.versions == (1, 1)
