"""Whole episodes: what is trained of them, across turns and weights, and how they are evaluated."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from actors.rollout import to_trajectory
from jobs.evaluate import evaluate_directory
from raylign.config import AlignConfig, EnvironmentConfig, EvaluateConfig, UserError
from raylign.data.chat.encoding import encode_dialogues
from raylign.data.chat.faults import find_fault
from raylign.data.instructions import parse_row
from raylign.data.textbook.arithmetic import Problem, call_tool, phrase_question
from raylign.environments.environment import Outcome
from raylign.environments.rendering import TurnRenderer
from raylign.environments.responding import EnvironmentResponder, plan_answers
from raylign.evaluation.episodes import evaluate_episodes
from raylign.evaluation.pairing import compare_models
from raylign.inference.episode import Episode, Reply
from raylign.inference.generator import Generator, Sample, Sampling, build_generator
from raylign.inference.serving import GeneratorLoop, Request
from raylign.models.loading import load_model, load_tokenizer
from raylign.models.logprobs import score_tokens
from raylign.records import Prompt, Trajectory, collate
from raylign.tokenization.special import read_template
from tests.environments.games import write_brief_model
from tests.tiny_model import write_speller
from tests.training.learning import learn, make_learner, weights_of

WORDS = "tests.environments.games:Words"
PROMPT = Prompt("p", (2, 5, 6, 7, 3), "w1 w2 w3", "")
SEEDED = Sampling(max_tokens=12, seed=3, stop=tuple(range(4, 10)))


def build(model: Path) -> Generator:
    return build_generator(
        "transformers",
        model,
        dtype="float32",
        max_length=64,
        kv_cache_mb=16,
        max_sequences=8,
        threads=1,
        seed=0,
    )


@pytest.fixture
def loop(tiny_model: Path) -> Iterator[GeneratorLoop]:
    loop = GeneratorLoop(build(tiny_model))
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Reads letters, with the plain chat template."""
    tokenizer = load_tokenizer(write_speller(tmp_path_factory.mktemp("speller")))
    tokenizer.chat_template = read_template(None)
    return tokenizer


@pytest.mark.parametrize("problem", [Problem(431, "-", 58), Problem(99999, "+", 7)])
def test_a_demonstration_is_the_episode_that_it_shows(
    speller: PreTrainedTokenizerBase, problem: Problem
) -> None:
    """Fine-tuning and reinforcement learning see the same tokens and train the same of them."""
    question = phrase_question(problem, random.Random(1))
    messages = [{"role": "user", "content": question}, *call_tool(problem)]
    assert find_fault(messages, speller.all_special_tokens) is None
    dialogue = parse_row({"messages": messages}, "messages")
    [[shown]] = encode_dialogues([dialogue], speller)  # type: ignore[list-item]
    asked = speller.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    prompt = Prompt("p", tuple(asked), question, str(problem.answer))
    respond = plan_answers(EnvironmentConfig(source="calculator"), speller, "align.environment")
    responder = respond(prompt)
    turns, replies = [], []
    for start, end in find_runs(shown.trained):
        said = tuple(shown.token_ids[start:end].tolist())
        text = speller.decode(said, skip_special_tokens=True)
        none = np.zeros(len(said), np.float32)
        turns.append(Sample(said, none, none.astype(np.int32), text, "stop"))
        replies.append(responder.reply(turns[-1]))
    episode = Episode(tuple(turns), tuple(replies))
    trajectory = to_trajectory(prompt, "g", episode, "")
    assert trajectory.token_ids.tolist() == shown.token_ids.tolist()
    assert trajectory.loss_mask.tolist() == shown.trained.tolist()
    assert (episode.reward, episode.finish_reason, len(turns)) == (1.0, "stop", 2)


def find_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.asarray([0, *mask, 0], np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_who_waits_for_an_environment_does_not_hang(tiny_model: Path, loop: GeneratorLoop) -> None:
    """A slow answer is no token, and yet nothing is wrong with the worker."""
    go_on = threading.Event()

    class Slow:
        def reply(self, turn: Sample) -> Reply:
            go_on.wait(30)
            return Reply(None, reward=1.0)

    for ordered in (False, True):
        go_on.clear()
        request = Request(PROMPT.token_ids, replace(SEEDED, max_tokens=2), respond=Slow)
        [future] = loop.submit([request], ordered)
        while not loop.busy:
            assert not future.done()
        go_on.set()
        assert future.result(30)[0].reward == 1.0
        while loop.busy:  # the last answer is counted after it was heard
            pass


def other_weights(model: Path) -> dict[str, torch.Tensor]:
    """Of the policy one update later."""
    stream = torch.Generator().manual_seed(9)
    return {
        name: tensor.detach() + 0.05 * torch.randn(tensor.shape, generator=stream)
        for name, tensor in load_model(model).named_parameters()
    }


@pytest.fixture(scope="module")
def updated(tiny_model: Path) -> list[Trajectory]:
    """Two groups of episodes of three turns; after the first turn that is heard of each group, the
    policy becomes another one, while the other episodes are at their turns."""
    loop, renewed = GeneratorLoop(build(tiny_model)), other_weights(tiny_model)
    made = []
    try:
        for group in ("0", "1"):

            def become(generator: Generator, version: int) -> None:
                old = dict(load_model(tiny_model).named_parameters())
                generator.load_weights(version, (renewed if version else old).items())

            loop.call(partial(become, version=0)).result(30)
            told = Once(lambda: loop.call(partial(become, version=1)).result(30))
            renderer = TurnRenderer(load_tokenizer(tiny_model))

            def respond(told: Once = told, renderer: TurnRenderer = renderer) -> Any:
                return EnvironmentResponder(lambda: Learning(told), PROMPT, renderer, 4, 30.0)

            sampling = replace(SEEDED, seed=int(group) + 5)
            [future] = loop.submit([Request(PROMPT.token_ids, sampling, 4, respond)])
            for episode in future.result(60):
                made.append(to_trajectory(PROMPT, group, episode, "w"))
    finally:
        loop.close()
    return [t.scored(float(t.environment_reward or 0.0) + i % 3, {}) for i, t in enumerate(made)]


class Once:
    """Does something the first time it is called."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._lock, self._done = work, threading.Lock(), False

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._done = True
                self._work()


class Learning:
    """Its first turn has the policy learn."""

    def __init__(self, told: Once) -> None:
        self._told, self._turns = told, 0

    def reset(self, prompt: Prompt) -> None:
        pass

    def step(self, completion: str) -> Outcome:
        self._turns += 1
        self._told()
        return Outcome("w8 w9", reward=0.5, done=self._turns == 3)


@torch.no_grad()
def test_every_sampled_token_has_the_logprob_of_the_policy_that_drew_it(
    tiny_model: Path, updated: list[Trajectory]
) -> None:
    old, new = load_model(tiny_model), load_model(tiny_model)
    for name, tensor in other_weights(tiny_model).items():
        new.get_parameter(name).copy_(tensor)
    within = 0
    for trajectory in updated:
        tokens = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
        by_version = [score_tokens(model, tokens)[0][0].numpy() for model in (old, new)]
        mask, versions = trajectory.loss_mask, trajectory.versions
        expected = np.where(versions == 1, by_version[1], by_version[0])
        np.testing.assert_allclose(trajectory.logprobs[mask], expected[mask], atol=2e-5)
        assert not trajectory.logprobs[~mask].any() and (versions[~mask] == -1).all()
        assert (np.diff(versions[mask]) >= 0).all()
        turns = [set(versions[start:end].tolist()) for start, end in find_runs(mask)]
        assert len(turns) == trajectory.turns
        within += {0, 1} in turns
    assert within, "no turn went on over the update"
    assert {0, 1} <= {int(v) for t in updated for v in t.versions}


def test_what_a_tool_says_is_not_trained(tiny_model: Path, updated: list[Trajectory]) -> None:
    """Its tokens have no weight, whatever is written down for them; the policy's turns have, each
    token of all turns the same."""
    assert sum(len(find_runs(t.loss_mask)) > 1 for t in updated) > len(updated) / 2
    batch = collate(updated, [1.0] * len(updated), [0.5] * len(updated), 0)
    assert torch.equal(batch.weights > 0, batch.loss_mask)
    shown = [~t.loss_mask for t in updated]
    assert sum(int(mask[5:].sum()) for mask in shown) > 20  # beyond the prompts
    odd = [
        replace(t, logprobs=np.where(mask, np.float32(-3), t.logprobs))
        for t, mask in zip(updated, shown, strict=True)
    ]
    plain, misled = (make_learner(tiny_model, history=1, sample=8) for _ in range(2))
    found = learn(plain, updated)
    learn(misled, odd)
    theirs = weights_of(misled)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights_of(plain).items())
    start = dict(load_model(tiny_model).named_parameters())
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights_of(plain).items())
    assert found.metrics["entropy"].count == sum(t.sampled_tokens for t in updated)


HELD_OUT = [
    {"id": str(i), "prompt": f"w{i} w{i + 1}", "reference": "1", "key": f"{i} + 0"}
    for i in range(20)
]


@pytest.fixture(scope="module")
def brief_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brief_model(tiny_model, tmp_path_factory.mktemp("brief"))


def evaluate(model: Path, directory: Path, environment: EnvironmentConfig, **given: Any) -> Any:
    lines = "".join(json.dumps(row) + "\n" for row in HELD_OUT)
    (directory / "held_out.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = load_tokenizer(model)
    return evaluate_episodes(build(model), tokenizer, directory, environment, **given)


def test_problems_are_answered_turn_by_turn(brief_model: Path, tmp_path: Path) -> None:
    plain = evaluate(brief_model, tmp_path, EnvironmentConfig(source=WORDS), max_tokens=6)
    documents = plain["documents"]["episodes"]
    assert [d["doc"]["id"] for d in documents] == [str(i) for i in range(20)]
    several = [d for d in documents if d["scores"]["several_turns"]]
    assert 2 < len(several) < 20
    for document in documents:
        scores = document["scores"]
        # Who ends a turn is answered; the others were cut off, which is worth nothing.
        assert ("w8 w9" in document["answer"]) == (document in several) or not scores["reward"]
        assert scores["exact"] == float(scores["reward"] >= 1)
    metrics = plain["metrics"]["episodes"]
    assert metrics["several_turns"]["value"] == len(several) / 20
    assert metrics["reward"]["value"] == sum(d["scores"]["reward"] for d in documents) / 20 > 0
    assert metrics["exact_1_digit"]["n"] == metrics["exact_2_digit"]["n"] == 10

    broken, hung = (d["doc"]["prompt"] for d in several[:2])
    options: dict[str, Any] = {"breaks": broken, "hangs": hung}
    environment = EnvironmentConfig(source=WORDS, options=options, deadline_s=0.5)
    found = evaluate(brief_model, tmp_path, environment, max_tokens=6)
    for before, after in zip(documents, found["documents"]["episodes"], strict=True):
        failed = before["doc"]["prompt"] in (broken, hung)
        assert after["scores"] == ({} if failed else before["scores"])
    assert found["metrics"]["episodes"]["reward"]["n"] == 18


def test_a_model_directory_is_asked_in_episodes_alone(brief_model: Path, tmp_path: Path) -> None:
    """As `jobs.evaluate` does, and what becomes of it beside another model's."""
    plain = evaluate(brief_model, tmp_path, EnvironmentConfig(source=WORDS), max_tokens=6)
    config = EvaluateConfig.model_validate(
        {
            "tasks": ["episodes"],
            "environment": {"source": WORDS},
            "max_tokens": 6,
            "backend": "transformers",
            "limit": 8,
        }
    )
    found = evaluate_directory(brief_model, tmp_path, config, 0)
    assert found["documents"]["episodes"] == plain["documents"]["episodes"][:8]
    both = compare_models({"one": found, "other": found})
    assert both["tasks"]["episodes"]["metric"]["several_turns"]["one"]["n"] == 8
    assert {change["value"] for change in both["differences"]} == {0.0}
    assert both["answers"]["other"][0]["answer"] == plain["documents"]["episodes"][0]["answer"]


def test_an_environment_that_always_fails_is_no_result(tiny_model: Path, tmp_path: Path) -> None:
    environment = EnvironmentConfig(source="tests.environments.games:Broken")
    with pytest.raises(UserError, match=r"^evaluate\.environment: environment raised LookupError"):
        evaluate(tiny_model, tmp_path, environment, max_tokens=6)
    with pytest.raises(UserError, match=r"^evaluate\.environment\.source='clock': unknown"):
        evaluate(tiny_model, tmp_path, EnvironmentConfig(source="clock"))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"tasks": ["episodes"]}, "give environment.source"),
        ({"environment": {"source": "calculator"}}, "no effect unless tasks has episodes"),
        (
            {"tasks": ["episodes"], "environment": {"source": "calculator"}, "chat": False},
            "need the chat template",
        ),
    ],
)
def test_what_makes_no_sense_of_episodes_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EvaluateConfig.model_validate(given)


def test_the_longest_completion_is_that_of_all_turns() -> None:
    given: dict[str, Any] = {"sampling": {"max_tokens": 40}}
    assert AlignConfig.model_validate(given).longest == 40
    given["environment"] = {"source": "calculator", "max_turns": 3}
    assert AlignConfig.model_validate(given).longest == 120
