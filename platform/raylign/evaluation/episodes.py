"""The task `episodes`: held-out problems, answered greedily in an environment, turn by turn.

What the model says is answered as in training, by the same code; lm-eval knows no such tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config import EnvironmentConfig, UserError
from raylign.environments.responding import plan_answers
from raylign.evaluation.tasks import EPISODES, count_digits, digit_metric, require_data
from raylign.evaluation.uncertainty import measure_mean
from raylign.inference.episode import Episode
from raylign.inference.generator import Generator, Sampling
from raylign.inference.serving import GeneratorLoop, Request
from raylign.models.loading import require_chat_template
from raylign.records import Prompt


def evaluate_episodes(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    environment: EnvironmentConfig,
    limit: int | None = None,
    *,
    max_tokens: int = 96,
) -> dict[str, Any]:
    """Take the problems of `held_out.jsonl` in `corpus` through an episode each.

    Returns what `evaluate_model` does. `exact` says whether the environment gave 1 or more in all,
    `reward` what it gave, and `several_turns` whether the model spoke more than once: whether it
    made use of what answers. An episode that the environment failed has no scores. Raises
    `UserError` for an environment that cannot be made, and when it failed every episode.
    """
    require_chat_template(tokenizer, Path(tokenizer.name_or_path))
    rows = _read_rows(corpus)[:limit]
    prompts = [_to_prompt(row, tokenizer) for row in rows]
    respond = plan_answers(environment, tokenizer, "evaluate.environment")
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    loop = GeneratorLoop(generator)
    try:
        requests = [Request(p.token_ids, sampling, 1, partial(respond, p)) for p in prompts]
        futures = loop.submit(requests, ordered=True)
        episodes = [future.result()[0] for future in futures]
    except ValueError as error:
        raise UserError(f"evaluate.tasks: {EPISODES!r}: {error}") from None
    finally:
        loop.close()
    documents = [_score(*pair, tokenizer) for pair in zip(rows, episodes, strict=True)]
    failures = [episode.failure for episode in episodes if episode.failure is not None]
    if len(failures) == len(episodes):
        first = failures[0]
        raise UserError(f"evaluate.environment: {first.failure} in every episode ({first.detail})")
    names = sorted({name for document in documents for name in document["scores"]})
    return {
        "metrics": {EPISODES: {name: _average(documents, name) for name in names}},
        "higher_is_better": {EPISODES: {name: True for name in names if name != "several_turns"}},
        "documents": {EPISODES: documents},
    }


def _read_rows(corpus: Path) -> list[dict[str, Any]]:
    text = require_data(corpus / "held_out.jsonl", EPISODES).read_text(encoding="utf-8")
    # Not splitlines(): a JSON string may hold U+2028 and its like, which that takes for ends.
    return [json.loads(line) for line in text.split("\n") if line]


def _to_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    question = [{"role": "user", "content": row["prompt"]}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    return Prompt(str(row["id"]), tuple(tokens), row["prompt"], str(row["reference"]))


def _score(
    row: Mapping[str, Any], episode: Episode, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One document as the harness keeps it; its answer is all that was said and shown."""
    said = tokenizer.decode(episode.listing(), skip_special_tokens=True)
    document = {"doc": dict(row), "answer": said, "scores": {}, "likelihoods": {}}
    if episode.failure is None:
        reward = episode.reward or 0.0
        exact = float(reward >= 1)
        document["scores"] = {
            "exact": exact,
            "reward": reward,
            "several_turns": float(len(episode.turns) > 1),
            digit_metric(count_digits(str(row["key"]))): exact,
        }
    return document


def _average(documents: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | int | None]:
    values = [d["scores"][name] for d in documents if name in d["scores"]]
    value, stderr = measure_mean(values)
    return {"value": value, "stderr": stderr, "n": len(values)}
