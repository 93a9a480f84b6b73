from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from raylign.algorithms.catalog import ALGORITHMS, find_algorithm
from raylign.algorithms.policy import PolicyInputs
from raylign.algorithms.weighting import token_weights


def test_rows_are_named_and_documented() -> None:
    wanted = {"grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo"}
    assert wanted <= ALGORITHMS.keys()
    for name, row in ALGORITHMS.items():
        assert row.name == name and row.doc and "\n" not in row.doc
        assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)


def test_what_sets_the_rows_apart() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert ALGORITHMS["dr_grpo"].advantage(rewards, groups)[0] == pytest.approx(2 / 3)
    assert ALGORITHMS["rloo"].advantage(rewards, groups)[0] == pytest.approx(1.0)
    assert ALGORITHMS["grpo"].advantage(rewards, groups)[0] == pytest.approx(2 / 3**0.5, rel=1e-4)
    for name, row in ALGORITHMS.items():
        teaches_nothing = (row.advantage(rewards, groups)[3:] == 0).all()
        assert bool(teaches_nothing) is row.needs_groups, name
    weightings = {name: row.weighting for name, row in ALGORITHMS.items()}
    assert weightings["grpo"] == weightings["gspo"] == "sequences"
    assert weightings["dapo"] == weightings["cispo"] == weightings["reinforce_pp"] == "tokens"
    assert weightings["dr_grpo"] == weightings["rloo"] == "constant"


def test_find() -> None:
    assert find_algorithm("dapo") is ALGORITHMS["dapo"]


@pytest.mark.parametrize(
    ("typo", "suggestion"),
    [("grppo", "grpo"), ("DAPO", "dapo"), ("reinforce-pp", "reinforce_pp"), ("dr.grpo", "dr_grpo")],
)
def test_an_unknown_name_gets_a_suggestion(typo: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{suggestion}'") as error:
        find_algorithm(typo)
    assert "\n" not in str(error.value)


def test_a_typo_between_two_names_gets_both() -> None:
    with pytest.raises(ValueError, match="did you mean 'gspo' or 'grpo'"):
        find_algorithm("gpro")


def test_a_hopeless_name_gets_the_list() -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'zzz'; known: grpo, "):
        find_algorithm("zzz")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_learns(name: str) -> None:
    """Eight-token sequences of independent tokens; the reward is the share of token 2 in them."""
    row, length = ALGORITHMS[name], 8
    coefficients = replace(row.coefficients, kl_coef=0.0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    mask = torch.ones(32, length, dtype=torch.bool)
    weights = token_weights(mask, row.weighting, max_tokens=length)
    for _ in range(40):
        tokens = torch.multinomial(
            logits.detach().softmax(0), mask.numel(), replacement=True, generator=generator
        ).view(mask.shape)
        rewards = (tokens == 2).float().mean(1)
        advantages = row.advantage(rewards, torch.arange(32) // 8)[:, None].expand(mask.shape)
        behaviour = logits.detach().log_softmax(0)[tokens]
        for _ in range(2):
            logprobs = logits.log_softmax(0)[tokens]
            inputs = PolicyInputs(
                logprobs, torch.zeros_like(logprobs), behaviour, behaviour, advantages, weights
            )
            loss, _ = row.loss(inputs, coefficients)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert logits.softmax(0)[2] > 0.6  # from 0.2
