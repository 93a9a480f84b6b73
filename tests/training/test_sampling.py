"""Continuations: greedy, or drawn by a seed of their own."""

from __future__ import annotations

from pathlib import Path

import torch

from raylign.models.loading import load_model, load_tokenizer
from raylign.training.sampling import Sampler


def test_drawn_text_is_a_function_of_its_seed_and_disturbs_nothing(tiny_model: Path) -> None:
    sampler = Sampler(load_model(tiny_model, "float32"), load_tokenizer(tiny_model))
    prompt = (5, 6, 7)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = sampler.complete(prompt, 12, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert sampler.complete(prompt, 12, temperature=1.0, seed=1) == first
    others = {sampler.complete(prompt, 12, temperature=1.0, seed=seed) for seed in range(2, 6)}
    assert others != {first}
    greedy = sampler.complete(prompt, 12)
    assert sampler.complete(prompt, 12, seed=9) == greedy
    # So cold that the likeliest token is always drawn.
    assert sampler.complete(prompt, 12, temperature=1e-4, seed=3) == greedy
