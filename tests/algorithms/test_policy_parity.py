"""Credit and policy losses against TRL's trainers, given the same rewards and log-probs.

TRL's own code computes advantages, importance weights and losses; only what it would sample, and
what its models would say of that, is put in its hands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raylign.algorithms.advantages import group_relative
from raylign.algorithms.catalog import ALGORITHMS, Algorithm
from raylign.algorithms.credit import assign_credit, penalise_tokens
from raylign.algorithms.importance import Importance
from raylign.algorithms.masked import sequence_sums
from raylign.algorithms.online_preference import pair_numbers
from raylign.algorithms.policy import PolicyInputs
from raylign.algorithms.weighting import token_weights

ROWS, WIDTH, GROUP, MAX_TOKENS = 8, 7, 4, 16


@dataclass(frozen=True)
class Sampled:
    """What was sampled, and what four policies say of it; [B, T], completions only."""

    lengths: list[int]
    real: Tensor  # bool: not padding
    mask: Tensor  # bool: real, and no tool output
    current: Tensor
    old: Tensor
    behaviour: Tensor
    reference: Tensor
    entropy: Tensor
    rewards: Tensor  # [B]


@pytest.fixture
def sampled() -> Sampled:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, ROWS, WIDTH, generator=generator)
    lengths = [7, 3, 5, 6, 2, 7, 4, 1]
    real = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    mask = real & (torch.rand(ROWS, WIDTH, generator=generator) < 0.8)
    mask[:, 0] = True
    old = -1 - noise[0].abs()
    return Sampled(
        lengths,
        real,
        mask,
        current=(old + 0.4 * noise[1]).requires_grad_(),
        old=old,
        behaviour=torch.where(real, old + 0.4 * noise[2], 0.0),
        reference=old + 0.5 * noise[3],
        entropy=noise[4].abs(),
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, -1.0, 0.3, 0.2]),
    )


def settle(trainer: Any, sampled: Sampled, sample: tuple[Any, ...]) -> None:
    """Put samples, scores and log-probs into a trainer's hands."""
    trainer.model.eval()
    trainer.num_generations_eval = GROUP
    reference = object()
    trainer.ref_model = reference

    def score(model: Any, *_: Any, compute_entropy: bool = False, **__: Any) -> tuple[Any, ...]:
        if model is reference:
            return sampled.reference, None, None
        return (sampled.current if compute_entropy else sampled.old), sampled.entropy, None

    trainer._get_per_token_logps_and_entropies = score
    trainer._generate = lambda prompts: sample
    trainer._calculate_rewards = lambda *_: sampled.rewards[:, None]


def make(kind: Any, config: Any, model: Path, directory: Path, **more: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return kind(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=lambda **_: [],
        args=config(
            output_dir=str(directory),
            use_cpu=True,
            report_to=[],
            bf16=False,
            per_device_train_batch_size=8,
            **more,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2"}] * ROWS),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def learn(row: Algorithm, sampled: Sampled, mask: Tensor, max_tokens: int) -> Tensor:
    """Our loss on the same batch."""
    numbers, groups = row.coefficients, torch.arange(ROWS) // GROUP
    kl = penalise_tokens(sampled.old, sampled.reference, mask, numbers)
    advantages, _ = assign_credit(
        row,
        numbers,
        sampled.rewards,
        groups,
        mask,
        torch.arange(ROWS),
        kl_sums=sequence_sums(kl, mask),
    )
    inputs = PolicyInputs(
        logprobs=sampled.current,
        entropy=sampled.entropy,
        old_logprobs=sampled.old,
        behaviour_logprobs=sampled.behaviour,
        advantages=advantages,
        weights=token_weights(mask, row.weighting, max_tokens=max_tokens),
        reference_logprobs=sampled.reference,
    )
    return row.loss(inputs, numbers)[0]


def agree(ours: Tensor, theirs: Tensor, sampled: Sampled, *, gradient_only: bool = False) -> None:
    if not gradient_only:
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    left, right = (torch.autograd.grad(loss, sampled.current)[0] for loss in (ours, theirs))
    assert right.abs().max() > 1e-3
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


TRUNCATE: dict[str, Any] = {"mode": "token_truncate", "clip_max": 2.0, "clip_min": None}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("grpo", {}, {}, TRUNCATE),
    ("grpo", {}, {"importance": Importance("none")}, {}),
    ("grpo_dual_clip", {"delta": 1.3}, {"dual_clip": 1.3}, TRUNCATE),
    ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}, {}, TRUNCATE),
    ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}, {"entropy_coef": 0.03}, TRUNCATE),
    ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}, {}, TRUNCATE),
    (
        "gspo",
        {"level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        {"clip_low": 0.03, "clip_high": 0.04, "importance": Importance()},
        TRUNCATE,
    ),
    (
        "grpo",
        {},
        {"importance": Importance("mask", "token", cap=1.4, floor=0.7)},
        {"mode": "token_mask", "clip_max": 1.4, "clip_min": 0.7},
    ),
    (
        "grpo",
        {},
        {"importance": Importance("mask", "sequence", cap=2.0, floor=0.5)},
        {"mode": "sequence_mask", "clip_max": 2.0, "clip_min": 0.5},
    ),
    (
        "grpo",
        {},
        {"importance": Importance("truncate", "sequence", cap=1.5)},
        {"mode": "sequence_truncate", "clip_max": 1.5, "clip_min": None},
    ),
]


@pytest.mark.slow
def test_the_grpo_family_agrees_with_trl(
    tiny_model: Path, tmp_path: Path, sampled: Sampled
) -> None:
    from trl import GRPOConfig, GRPOTrainer

    trainer = make(
        GRPOTrainer,
        GRPOConfig,
        tiny_model,
        tmp_path,
        num_generations=GROUP,
        max_completion_length=MAX_TOKENS,
        use_bias_correction_kl=False,  # it multiplies k3 by the ratio
    )
    ids = [[5] * n for n in sampled.lengths]
    tool = [sampled.mask[b, :n].int().tolist() for b, n in enumerate(sampled.lengths)]
    logprobs = [sampled.behaviour[b, :n].tolist() for b, n in enumerate(sampled.lengths)]
    settle(trainer, sampled, ([[4]] * ROWS, ids, tool, [""] * ROWS, logprobs, {}, None, None))
    for name, theirs, ours, importance in CASES:
        row = replace(ALGORITHMS[name], coefficients=replace(ALGORITHMS[name].coefficients, **ours))
        if theirs.get("scale_rewards", "group") == "group":
            # TRL adds more to the deviation.
            row = replace(row, advantage=partial(group_relative, scale_by_std=True, eps=1e-4))
        trainer.loss_type = theirs.get("loss_type", "grpo")
        trainer.scale_rewards = theirs.get("scale_rewards", "group")
        trainer.importance_sampling_level = theirs.get("level", "token")
        trainer.epsilon_low = theirs.get("epsilon_low", 0.2)
        trainer.epsilon_high = theirs.get("epsilon_high", 0.2)
        trainer.args.delta = theirs.get("delta")
        trainer.beta = row.coefficients.kl_coef
        trainer.entropy_coef = row.coefficients.entropy_coef
        trainer._entropy_bonus_enabled = trainer.entropy_coef > 0
        # The old policy's log-probs are only asked for when there is a correction: none is one that
        # is held at 1.
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.vllm_importance_sampling_mode = importance.get("mode", "token_truncate")
        trainer.vllm_importance_sampling_clip_max = importance.get("clip_max", 1.0)
        trainer.vllm_importance_sampling_clip_min = importance.get("clip_min", 1.0)
        batch = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * ROWS)
        loss = trainer.compute_loss(trainer.model, batch)
        agree(learn(row, sampled, sampled.mask, MAX_TOKENS), loss, sampled)


@pytest.mark.slow
def test_rloo_agrees_with_trl(tiny_model: Path, tmp_path: Path, sampled: Sampled) -> None:
    from trl import RLOOConfig, RLOOTrainer

    trainer = make(RLOOTrainer, RLOOConfig, tiny_model, tmp_path, num_generations=GROUP, beta=0.05)
    # Completions without tool output, for TRL's RLOO knows none.
    settle(trainer, sampled, ([[4]] * ROWS, [[5] * n for n in sampled.lengths], [""] * ROWS))
    batch = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * ROWS)
    theirs = trainer.compute_loss(trainer.model, batch)
    row = ALGORITHMS["rloo"]
    row = replace(row, coefficients=replace(row.coefficients, importance=Importance("none")))
    # Ours counts the sequence's value once a token, and has the same gradient.
    agree(learn(row, sampled, sampled.real, 1), theirs, sampled, gradient_only=True)


@pytest.mark.slow
def test_online_dpo_agrees_with_trl(tiny_model: Path, tmp_path: Path, sampled: Sampled) -> None:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    trainer = make(
        OnlineDPOTrainer,
        OnlineDPOConfig,
        tiny_model,
        tmp_path,
        beta=0.3,
        max_length=64,
        missing_eos_penalty=None,
    )
    # There a group is two completions, half a batch apart.
    half = ROWS // 2
    ids, real = torch.full((ROWS, WIDTH), 5), sampled.real.int()
    trainer._generate = lambda *_: (ids[:, :1], real[:, :1], ids, real, None)
    trainer._forward = lambda model, *_: (
        sampled.current if model is trainer.model else sampled.reference
    )
    trainer.ref_model = object()
    trainer._calculate_rewards_from_functions = lambda **_: sampled.rewards
    losses: list[Tensor] = []
    trainer.accelerator = SimpleNamespace(
        backward=losses.append, gather_for_metrics=lambda values: values
    )
    trainer.training_step(trainer.model, {"prompt": ["w1 w2"] * half})
    row, groups = ALGORITHMS["online_dpo"], torch.arange(ROWS) % half
    numbers = replace(row.coefficients, beta=0.3)
    pairs = pair_numbers(sampled.rewards, groups)
    mask = sampled.real & (pairs >= 0)[:, None]
    advantages, _ = assign_credit(row, numbers, sampled.rewards, groups, mask, torch.arange(ROWS))
    ours, _ = row.loss(
        PolicyInputs(
            sampled.current,
            sampled.entropy,
            sampled.old,
            sampled.behaviour,
            advantages,
            token_weights(mask, row.weighting, max_tokens=WIDTH),
            sampled.reference,
            pairs,
        ),
        numbers,
    )
    agree(ours, losses[0], sampled)
