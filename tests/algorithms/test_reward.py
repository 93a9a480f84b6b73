"""Losses of reward models: by hand, and Bradley-Terry against TRL's trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raylign.algorithms.reward import bradley_terry, count_right, right_or_wrong

CHOSEN, REJECTED = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])


def cost(gap: float) -> float:
    return math.log(1 + math.exp(-gap))


def test_bradley_terry_by_hand() -> None:
    assert bradley_terry(CHOSEN, REJECTED).tolist() == pytest.approx([cost(0.5), cost(-3)])
    margins = torch.tensor([0.25, 1.0])
    found = bradley_terry(CHOSEN, REJECTED, margins, centring=0.1)
    expected = [cost(0.25) + 0.1 * 1.5**2, cost(-4) + 0.1]
    assert found.tolist() == pytest.approx(expected)


def test_only_centring_sees_a_common_shift() -> None:
    assert torch.allclose(bradley_terry(CHOSEN + 7, REJECTED + 7), bradley_terry(CHOSEN, REJECTED))
    scores = torch.tensor([3.0], requires_grad=True)
    bradley_terry(scores, scores, centring=0.5).sum().backward()
    assert float(scores.grad) == pytest.approx(0.5 * 2 * 6 * 2)


def test_right_or_wrong_by_hand() -> None:
    scores, labels = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([True, True, False])
    expected = [cost(2), cost(-1), math.log(2)]
    assert right_or_wrong(scores, labels).tolist() == pytest.approx(expected)
    found = {k: float(t / c) for k, (t, c) in count_right(scores, labels).items()}
    assert found == pytest.approx({"accuracy": 0.5, "scores/right": 0.5, "scores/wrong": 0.0})


@pytest.mark.slow
def test_bradley_terry_agrees_with_trl(tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)

    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "w1"}, {"role": "assistant", "content": answer}]

    rows = [
        {"chosen": talk("w2 w3"), "rejected": talk("w4"), "margin": 0.5},
        {"chosen": talk("w5"), "rejected": talk("w6 w7 w8"), "margin": 0.0},
        {"chosen": talk("w9 w10"), "rejected": talk("w11 w12"), "margin": 2.0},
    ]
    config = RewardConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3,
        center_rewards_coefficient=0.05,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = float(trainer.compute_loss(model, dict(batch)))
    model.eval()
    scores = [
        model(input_ids=row[real][None]).logits[0, 0]
        for row, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    ]
    chosen, rejected = torch.stack(scores[:3]), torch.stack(scores[3:])
    ours = bradley_terry(chosen, rejected, torch.as_tensor(batch["margin"]), 0.05).mean()
    assert float(ours) == pytest.approx(theirs, abs=1e-5)
    accuracy = float(torch.mean((chosen > rejected).float()))
    assert accuracy == pytest.approx(trainer._metrics["eval"]["accuracy"][-1])
