"""A look at what a model in training writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raylign.models.loading import list_stops, pad_id
from raylign.tracking import read_lines

SAMPLES_FILE = "samples.jsonl"
COMPARISON_FILE = "samples.md"


class Sampler:
    """Continuation with transformers; leaves the model in evaluation mode."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._lm, self._tokenizer = lm.eval(), tokenizer

    @torch.no_grad()
    def complete(
        self, prompt: Sequence[int], tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Up to `tokens` tokens after `prompt`, decoded, ended by the end of sequence or of the
        model's context. Greedy at temperature 0, else drawn by `seed`."""
        room = int(self._lm.config.max_position_embeddings) - len(prompt)
        if room < 1:
            return ""
        ids = torch.tensor([list(prompt)], device=self._lm.device)
        settings = GenerationConfig(
            do_sample=temperature > 0,
            temperature=temperature or None,
            max_new_tokens=min(tokens, room),
            eos_token_id=list(list_stops(self._lm.config, self._tokenizer)),
            pad_token_id=pad_id(self._tokenizer),
        )
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = self._lm.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        return self._tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def compare_samples(stage: Path) -> list[tuple[str, str, str]]:
    """(prompt, before, after) of a stage that sampled before its first step and after its last;
    also written to its `samples.md`. Empty for one that did not."""
    rows = read_lines(stage / SAMPLES_FILE)
    texts = {(row["step"], row["prompt"]): row["text"] for row in rows}
    last = max((row["step"] for row in rows), default=0)
    prompts = [row["prompt"] for row in rows if row["step"] == 0] if last else []
    found = [(p, texts[0, p], texts[last, p]) for p in prompts if (last, p) in texts]
    if found:
        lines = ["| prompt | before | after |", "|---|---|---|"]
        lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in found]
        (stage / COMPARISON_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
