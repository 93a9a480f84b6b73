"""A look at what a model in training writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raylign.models.loading import pad_id


class Sampler:
    """Greedy continuation with transformers; leaves the model in evaluation mode."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._lm, self._tokenizer = lm.eval(), tokenizer

    @torch.no_grad()
    def complete(self, prompt: Sequence[int], tokens: int) -> str:
        """Up to `tokens` tokens after `prompt`, decoded, ended by the end of sequence or of the
        model's context."""
        room = int(self._lm.config.max_position_embeddings) - len(prompt)
        if room < 1:
            return ""
        ids = torch.tensor([list(prompt)], device=self._lm.device)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(tokens, room),
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=pad_id(self._tokenizer),
        )
        output = self._lm.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        return self._tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
