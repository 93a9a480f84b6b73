"""The loop shares one generator among callers, and lets nothing out that was not proved."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raylign.inference.generator import Generator, Sampling, build_generator
from raylign.inference.serving import GeneratorLoop

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


def test_many_threads_get_their_own_answers(loop: GeneratorLoop) -> None:
    prompts = [(5 + i % 7, 9, 11) for i in range(24)]
    alone = {p: loop.submit(p, GREEDY).result(30)[0].token_ids for p in set(prompts)}
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda p: loop.submit(p, GREEDY).result(30)[0], prompts))
    assert [s.token_ids for s in together] == [alone[p] for p in prompts]


def test_a_prompt_that_does_not_fit_fails_alone(loop: GeneratorLoop) -> None:
    long = loop.submit(tuple(range(4, 80)), GREEDY)
    fine = loop.submit((5, 6), GREEDY)
    with pytest.raises(ValueError, match="76 tokens; the context holds 64"):
        long.result(30)
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
    waiting = loop.submit((5, 6), GREEDY)  # arrives while the update fails
    go.set()
    with pytest.raises(RuntimeError, match="half loaded"):
        failed.result(30)
    with pytest.raises(RuntimeError, match="half loaded"):
        waiting.result(30)
    with pytest.raises(RuntimeError, match="half loaded"):
        loop.submit((5, 6), GREEDY).result(30)


def test_closing_fails_what_still_waits(loop: GeneratorLoop) -> None:
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.submit((5, 6), GREEDY).result(30)
