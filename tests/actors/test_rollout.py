"""A rollout worker by itself: what it is handed it answers for, turn by turn, or gives back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.rollout import Answer, Errand, RolloutRequest, RolloutWorker
from raylign.config import EnvironmentConfig, RolloutConfig
from raylign.inference.generator import Sampling
from raylign.models.loading import load_model
from raylign.models.logprobs import score_tokens
from raylign.records import Prompt, Trajectory

PROMPT = Prompt("p", (2, 5, 6, 7, 3), "w1 w2 w3", "")
SEEDED = Sampling(max_tokens=6, seed=1)

# A game of three turns that wants w9 said; w8 w9 is what it shows.
GAME = """
from raylign.environments.environment import Outcome

class Game:
    def __init__(self, breaks=False):
        self.breaks, self.turns = breaks, 0

    def reset(self, prompt):
        assert prompt.text == "w1 w2 w3"

    def step(self, completion):
        self.turns += 1
        if self.breaks and self.turns == 2:
            raise LookupError("the board is gone")
        return Outcome("w8 w9", reward=0.5, done=self.turns == 3)
"""


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("game")
    (directory / "raylign_test_game.py").write_text(GAME, encoding="utf-8")
    sys.path.insert(0, str(directory))
    yield "raylign_test_game:Game"
    sys.path.remove(str(directory))


def make_worker(model: Path, environment: EnvironmentConfig | None = None) -> RolloutWorker:
    config = RolloutConfig(backend="transformers")
    return RolloutWorker("rollout-7", model, config, 64, 0, environment)


def listen(worker: RolloutWorker, wanted: int) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    end = time.monotonic() + 30
    while len(answers) < wanted and time.monotonic() < end:
        pulse = worker.pulse(0.5)
        assert not pulse.broken, pulse.broken
        answers |= {answer.key: answer for answer in pulse.answers}
    return answers


def request(count: int = 2, prompt: Prompt = PROMPT, **changes: Any) -> RolloutRequest:
    return RolloutRequest(
        prompt, "g", Sampling(**({"max_tokens": 6, "seed": 1} | changes)), count, 0
    )


def trajectories_of(answer: Answer) -> tuple[Trajectory, ...]:
    assert answer.rollout is not None
    return answer.rollout.trajectories


@torch.no_grad()
def check_logprobs(model: Path, trajectory: Trajectory) -> None:
    """Every sampled token has the log-probability of its place, across turns."""
    tokens = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
    scores = score_tokens(load_model(model), tokens, None)[0][0].numpy()
    mask = trajectory.loss_mask
    np.testing.assert_allclose(trajectory.logprobs[mask], scores[mask], atol=2e-5)
    assert not trajectory.logprobs[~mask].any()
    assert (trajectory.versions[~mask] == -1).all() and (trajectory.versions[mask] == 0).all()


def test_a_prompt_that_does_not_fit_is_at_fault_alone(tiny_model: Path) -> None:
    worker = make_worker(tiny_model)
    long = Prompt("long", tuple(range(2, 52)) * 2, "", "")
    worker.submit([Errand("a", request()), Errand("b", request(prompt=long))])
    answers = listen(worker, 2)
    [first, second] = trajectories_of(answers["a"])
    assert answers["b"].fault == "the prompt has 100 tokens; the context holds 64"
    assert (first.worker, first.turns, first.environment_reward) == ("rollout-7", 1, None)
    assert first.token_ids.tolist() != second.token_ids.tolist()
    check_logprobs(tiny_model, first)


def test_what_is_taken_back_goes_on_in_another_worker(tiny_model: Path) -> None:
    old, new = make_worker(tiny_model), make_worker(tiny_model)
    whole = request(count=4, max_tokens=50)
    old.submit([Errand("a", whole)])
    old.withdraw(["a", "late"])
    old.submit([Errand("late", whole)])
    answers = listen(old, 2)
    assert answers["late"].taken_back == ()  # it had not come when it was taken back
    begun = answers["a"].taken_back
    assert begun is not None and len(begun) == 4
    new.submit([Errand("b", whole, begun)])
    for before, after in zip(begun, trajectories_of(listen(new, 1)["b"]), strict=True):
        said = before.listing()
        assert after.token_ids[5 : 5 + len(said)].tolist() == said
        check_logprobs(tiny_model, after)


def test_an_episode_is_one_sequence_of_which_the_policys_turns_are_trained(
    tiny_model: Path, game: str
) -> None:
    worker = make_worker(tiny_model, EnvironmentConfig(source=game, max_turns=5))
    stops = request(count=3, stop=tuple(range(4, 40)))  # most tokens end a turn
    worker.submit([Errand("a", stops)])
    worker.submit([Errand("b", stops)], ordered=True)
    answers = listen(worker, 2)
    for trajectory, same in zip(
        trajectories_of(answers["a"]), trajectories_of(answers["b"]), strict=True
    ):
        assert trajectory.token_ids.tolist() == same.token_ids.tolist()
        assert (trajectory.turns, trajectory.environment_reward) == (3, 1.5)
        check_logprobs(tiny_model, trajectory)
        tokens, mask = trajectory.token_ids.tolist(), trajectory.loss_mask.tolist()
        shown = [token for token, own in zip(tokens[5:], mask[5:], strict=True) if not own]
        # Each time the template's <eos>, where the policy did not say it, <user> w8 w9 <assistant>.
        assert [token for token in shown if token != 1] == [2, 12, 13, 3] * 2


def test_an_episode_is_cut_at_its_last_turn(tiny_model: Path, game: str) -> None:
    worker = make_worker(tiny_model, EnvironmentConfig(source=game, max_turns=2))
    worker.submit([Errand("a", request(count=1, stop=tuple(range(2, 56))))])
    [trajectory] = trajectories_of(listen(worker, 1)["a"])
    assert (trajectory.turns, trajectory.finish_reason) == (2, "length")
    assert trajectory.loss_mask[-1]  # nothing is shown that will not be answered


def test_a_broken_environment_is_no_fault_of_the_policy(tiny_model: Path, game: str) -> None:
    environment = EnvironmentConfig(source=game, options={"breaks": True})
    worker = make_worker(tiny_model, environment)
    worker.submit([Errand("a", request(stop=tuple(range(2, 56))))])
    rollout = listen(worker, 1)["a"].rollout
    assert rollout is not None and rollout.trajectories == ()
    assert [(r.prompt_id, r.reason, r.detail) for r in rollout.rejected] == [
        ("p", "environment raised LookupError", "the board is gone")
    ] * 2


def test_a_generator_that_breaks_says_so(tiny_model: Path) -> None:
    worker = make_worker(tiny_model)

    def fail() -> None:
        raise MemoryError("no room for the cache")

    worker._loop._generator.advance = fail  # type: ignore[method-assign, assignment]
    worker.submit([Errand("a", request())])
    while not (pulse := worker.pulse(0.1)).broken:
        pass
    assert pulse.broken == "MemoryError: no room for the cache" and not pulse.answers
