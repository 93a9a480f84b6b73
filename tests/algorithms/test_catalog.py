from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from raylign.algorithms.catalog import (
    ALGORITHMS,
    find_algorithm,
    needs_reference,
    resolve_coefficients,
)
from raylign.algorithms.credit import (
    apply_whitening,
    assign_credit,
    penalise_tokens,
    whiten_moments,
)
from raylign.algorithms.masked import sequence_sums
from raylign.algorithms.online_preference import pair_numbers
from raylign.algorithms.policy import PolicyInputs
from raylign.algorithms.weighting import token_weights


def test_rows_are_named_and_documented() -> None:
    wanted = {"ppo", "grpo", "grpo_dual_clip", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo"}
    wanted |= {"reinforce_pp_baseline", "gspo_token", "cispo", "online_dpo"}
    assert wanted <= ALGORITHMS.keys()
    for name, row in ALGORITHMS.items():
        assert row.name == name and row.doc and "\n" not in row.doc
        assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)


def test_what_sets_the_rows_apart() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1, 1])

    def advantage(name: str) -> torch.Tensor:
        function = ALGORITHMS[name].advantage
        assert function is not None
        return function(rewards, groups)

    assert advantage("dr_grpo")[0] == pytest.approx(2 / 3)
    assert advantage("rloo")[0] == pytest.approx(1.0)
    assert advantage("grpo")[0] == pytest.approx(2 / 3**0.5, rel=1e-4)
    assert advantage("reinforce_pp")[3:].tolist() == [5.0] * 3
    assert advantage("online_dpo").tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    for name, row in ALGORITHMS.items():
        if row.needs_groups:
            assert (advantage(name)[3:] == 0).all(), name
    weightings = {name: row.weighting for name, row in ALGORITHMS.items()}
    assert weightings["grpo"] == weightings["gspo"] == "sequences"
    assert weightings["dapo"] == weightings["cispo"] == weightings["reinforce_pp"] == "tokens"
    assert weightings["dr_grpo"] == weightings["rloo"] == "constant"
    assert [n for n, row in ALGORITHMS.items() if row.needs_values] == ["ppo"]
    assert [n for n, row in ALGORITHMS.items() if row.advantage is None] == ["ppo"]
    assert [n for n, row in ALGORITHMS.items() if row.pairwise] == ["online_dpo"]
    assert [n for n, row in ALGORITHMS.items() if row.dynamic_sampling] == ["dapo"]


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
    with pytest.raises(ValueError, match="unknown algorithm 'zzz'; known: ppo, grpo, "):
        find_algorithm("zzz")


def test_coefficients_of_the_user_replace_the_authors() -> None:
    row = ALGORITHMS["dapo"]
    assert resolve_coefficients(row, {}) == row.coefficients
    assert resolve_coefficients(row, {"clip_low": 0.1}).clip_high == 0.28
    ppo = resolve_coefficients(ALGORITHMS["ppo"], {"lam": 0.9, "value_clip": None})
    assert (ppo.lam, ppo.value_clip, ppo.whiten, ppo.kl_in) == (0.9, None, True, "reward")


@pytest.mark.parametrize(
    ("name", "given", "what"),
    [
        ("grpo", {"lam": 0.9}, "lam has no effect with grpo"),
        ("grpo", {"beta": 0.2}, "beta has no effect with grpo"),
        ("cispo", {"dual_clip": 3.0}, "dual_clip has no effect with cispo"),
        ("online_dpo", {"clip_low": 0.1}, "clip_low has no effect with online_dpo"),
        ("dapo", {"kl_estimator": "k2"}, "kl_estimator has no effect with kl_coef=0"),
        ("grpo", {"kl_in": "reward", "kl_coef": 0.0}, "kl_in has no effect with kl_coef=0"),
    ],
)
def test_a_coefficient_without_effect_is_refused(
    name: str, given: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what) as error:
        resolve_coefficients(ALGORITHMS[name], given)
    assert "\n" not in str(error.value)


def test_who_needs_the_reference() -> None:
    for name, wanted in (("grpo", True), ("dapo", False), ("ppo", True), ("online_dpo", True)):
        row = ALGORITHMS[name]
        assert needs_reference(row, row.coefficients) is wanted, name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_learns(name: str) -> None:
    """Eight-token sequences of independent tokens; the reward is the share of token 2 in them.
    The reference is the policy at the start, and the critic says the mean reward so far."""
    row, length, rows, value = ALGORITHMS[name], 8, 32, 0.2
    numbers = row.coefficients
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    reference = torch.zeros(5).log_softmax(0)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    everything, groups = torch.ones(rows, length, dtype=torch.bool), torch.arange(rows) // 8
    for _ in range(40):
        tokens = torch.multinomial(
            logits.detach().softmax(0), rows * length, replacement=True, generator=generator
        ).view(rows, length)
        rewards = (tokens == 2).float().mean(1)
        pairs = pair_numbers(rewards, groups) if row.pairwise else None
        mask = everything if pairs is None else everything & (pairs >= 0)[:, None]
        behaviour = logits.detach().log_softmax(0)[tokens]
        kl = penalise_tokens(behaviour, reference[tokens], mask, numbers)
        advantages, _ = assign_credit(
            row,
            numbers,
            rewards,
            groups,
            mask,
            torch.arange(rows),
            kl=kl,
            values=torch.full(mask.shape, value),
            kl_sums=sequence_sums(kl, mask),
        )
        value = 0.8 * value + 0.2 * float(rewards.mean())
        if numbers.whiten:
            advantages = apply_whitening(advantages, mask, whiten_moments(advantages, mask))
        weights = token_weights(mask, row.weighting, max_tokens=length)
        for _ in range(2):
            logprobs = logits.log_softmax(0)[tokens]
            inputs = PolicyInputs(
                logprobs,
                torch.zeros_like(logprobs),
                behaviour,
                behaviour,
                advantages,
                weights,
                reference[tokens],
                pairs,
            )
            loss, _ = row.loss(inputs, numbers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert logits.softmax(0)[2] > 0.5  # from 0.2
