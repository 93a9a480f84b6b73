"""Preference losses against TRL's trainers, on the same model and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raylign.algorithms.preference import (
    Answers,
    Numbers,
    chosen_cross_entropy,
    compare_rewards,
    conservative_dpo,
    dpo,
    ipo,
    kto,
    kto_kl,
    orpo,
    robust_dpo,
    simpo,
)
from raylign.models.logprobs import score_tokens

PROMPTS = ("w1 w2 w3", "w9 w1", "w20 w21 w22 w23 w24", "w7")
GOOD = ("w4 w5", "w10 w11 w12 w13", "w30", "w1 w40 w41")
BAD = ("w6 w7 w8", "w2", "w31 w32 w33 w34", "w1 w2")


def say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": say("user", p), "chosen": say("assistant", g), "rejected": say("assistant", b)}
        for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)
    ]


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> tuple[Any, Any, Any]:
    """Policy, a reference that differs from it, and their tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in reference.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=stream))
    return policy, reference, AutoTokenizer.from_pretrained(tiny_model)


def settings(kind: Any, directory: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(directory),
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        per_device_train_batch_size=4,
        **more,
    )


def sum_answers(model: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of log-probs and number of answer tokens [B]."""
    logprobs, _ = score_tokens(model, tokens)
    mask = mask.bool()
    mask[:, 0] = False
    return torch.where(mask, logprobs, 0.0).sum(1), mask.sum(1)


def halve(model: Any, reference: Any | None, batch: Any) -> tuple[Answers, Answers]:
    """Chosen and rejected answers of a batch in TRL's order."""
    tokens, mask = batch["input_ids"], batch["completion_mask"]
    sums, lengths = sum_answers(model, tokens, mask)
    with torch.no_grad():
        theirs = None if reference is None else sum_answers(reference, tokens, mask)[0]
    cut = len(sums) // 2
    return (
        Answers(sums[:cut], lengths[:cut], None if theirs is None else theirs[:cut]),
        Answers(sums[cut:], lengths[cut:], None if theirs is None else theirs[cut:]),
    )


@pytest.mark.slow
def test_the_dpo_family_agrees_with_trl(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference, tokenizer = models
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings(DPOConfig, tmp_path, beta=0.2, label_smoothing=0.15),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = halve(policy, reference, batch)
    numbers = Numbers(beta=0.2, label_smoothing=0.15)
    for name, loss in (("sigmoid", dpo), ("ipo", ipo), ("robust", robust_dpo)):
        trainer.loss_types = [name]
        theirs = trainer.compute_loss(policy, batch)
        ours = loss(chosen, rejected, numbers)
        assert float(ours.losses.mean()) == pytest.approx(float(theirs), abs=1e-5), name
        seen = compare_rewards(ours.chosen_rewards, ours.rejected_rewards)
        for key, metric in (
            ("rewards/chosen", "rewards/chosen"),
            ("rewards/margin", "rewards/margins"),
            ("rewards/accuracy", "rewards/accuracies"),
        ):
            mean = float(seen[key][0] / seen[key][1])
            reported = trainer._metrics["eval"][metric][-1]
            assert mean == pytest.approx(reported, abs=1e-5), (name, key)
    # TRL's sigmoid takes no smoothing any more; its `aot` on one pair is cDPO.
    trainer.loss_types = ["aot"]
    losses = []
    for index in range(4):
        one = {key: value[[index, index + 4]] for key, value in batch.items()}
        losses.append(float(trainer.compute_loss(policy, one)))
    ours = conservative_dpo(chosen, rejected, numbers).losses
    assert ours.tolist() == pytest.approx(losses, abs=1e-5)
    trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 0.7]
    theirs = trainer.compute_loss(policy, batch)
    term = 0.7 * chosen_cross_entropy(chosen) / chosen.lengths.sum()
    mixed = dpo(chosen, rejected, numbers).losses.mean() + term
    assert float(mixed) == pytest.approx(float(theirs), abs=1e-5)
    gradients = []
    for total in (mixed, theirs):
        policy.zero_grad()
        total.backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    policy.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_kto_agrees_with_trl(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference, tokenizer = models
    rows = [
        {
            "prompt": say("user", p),
            "completion": say("assistant", a),
            "label": index in (0, 2, 3),
        }
        for index, (p, a) in enumerate(zip(PROMPTS, GOOD, strict=True))
    ]
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.5}
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=settings(KTOConfig, tmp_path, beta=0.2, **weights),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(policy, batch)
    sums, lengths = sum_answers(policy, batch["input_ids"], batch["completion_mask"])
    held, _ = sum_answers(reference, batch["input_ids"], batch["completion_mask"])
    other = [
        sum_answers(model, batch["KL_input_ids"], batch["KL_completion_mask"])[0]
        for model in (policy, reference)
    ]
    kl = kto_kl((other[0] - other[1]).sum(), 4)
    labels = torch.as_tensor(batch["label"], dtype=torch.bool)
    losses, _ = kto(Answers(sums, lengths, held), labels, kl, Numbers(beta=0.2, **weights))
    assert float(losses.mean()) == pytest.approx(float(theirs), abs=1e-5)
    assert float(kl) == pytest.approx(trainer._metrics["eval"]["kl"][-1], abs=1e-5)


@pytest.mark.slow
def test_orpo_and_simpo_agree_with_trl(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, _, tokenizer = models
    for kind, config in (
        (ORPOTrainer, settings(ORPOConfig, tmp_path, beta=0.3, max_length=64)),
        (
            CPOTrainer,
            settings(
                CPOConfig,
                tmp_path,
                beta=2.0,
                simpo_gamma=0.8,
                loss_type="simpo",
                cpo_alpha=0.0,
                max_length=64,
            ),
        ),
    ):
        trainer = kind(
            model=policy,
            args=config,
            train_dataset=Dataset.from_list(pairs()),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        theirs, _ = trainer.get_batch_loss_metrics(policy, batch)
        halves = []
        for side in ("chosen", "rejected"):
            tokens, mask = batch[f"{side}_input_ids"], batch[f"{side}_labels"] != -100
            halves.append(Answers(*sum_answers(policy, tokens, mask)))
        if kind is CPOTrainer:
            ours = simpo(*halves, Numbers(beta=2.0, margin=0.8)).losses.mean()
        else:
            # There the fine-tuning half counts the prompt's tokens too.
            mask = batch["chosen_attention_mask"].bool()
            everything = Answers(*sum_answers(policy, batch["chosen_input_ids"], mask))
            term = chosen_cross_entropy(everything) / everything.lengths.sum()
            ours = orpo(*halves, Numbers(beta=0.3)).losses.mean() + term
        assert float(ours) == pytest.approx(float(theirs), abs=1e-5), kind
