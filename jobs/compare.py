"""Pairs to learn preferences from: `python -m jobs.compare recipe.yaml [compare.key=value ...]`.

Samples several completions of every prompt from a model, has them scored by the same sources as
reinforcement learning (verifiers, reward models, judges), and pairs a better with a worse one.
Writes the `comparisons` stage: `pairs.jsonl`, which `jobs.reward_model` and `jobs.preference` take
when they are given no data, and `completions.jsonl` with everything that was sampled. With
`compare.verdicts` also `verdicts.jsonl`: the same judgements as demonstrations, from which
`jobs.sft` makes a judge.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import ray

from actors.placement import place_rollout
from actors.rollout_pool import RolloutPool
from actors.supervision import BudgetSpent, PromptLost
from actors.teacher import TeacherWorker
from actors.weights import Canary, WeightManifest
from jobs.asking import hire_scorer, locate_asked, prepare_asked
from jobs.comparisons import PAIRS_FILE, PAIRS_STAGE
from jobs.entry import main, perform, section
from raylign.config import CompareConfig, Recipe, UserError, VerdictsConfig
from raylign.data.chat.faults import list_special_tokens
from raylign.inference.generator import Sampling
from raylign.models.loading import load_tokenizer
from raylign.records import Prompt, Trajectory
from raylign.rewards.contrast import choose_pairs
from raylign.rewards.hearing import check_judge
from raylign.rewards.lessons import list_lessons
from raylign.rewards.panel import check_sources
from raylign.rewards.rubric import load_rubric
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.tracking import Bar, ProgressBoard

COMPLETIONS_FILE = "completions.jsonl"
VERDICTS_FILE = "verdicts.jsonl"
Teaching = Callable[[Prompt, Sequence[Trajectory]], list[dict[str, Any]]]
_AHEAD = 4  # prompts in flight for each that a worker decodes at once


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `comparisons` stage."""
    config = section(recipe, "compare", CompareConfig)
    model, prompts, parents = locate_asked(run, config.model, config.prompts, "compare")
    check_sources(config.reward, model, "compare")
    if config.judge.model_fields_set:
        check_judge(config.judge, config.completions, "compare")
    teach = _plan_lessons(config.verdicts, model)

    def build(draft: Draft) -> None:
        ready, context = prepare_asked(model, prompts, config.sampling.max_tokens, "compare")
        seed = derive_seed(recipe.seed, "compare")
        if config.limit is not None and config.limit < len(ready):
            ready = random.Random(seed).sample(ready, config.limit)
        with board.bar("compare", len(ready), "prompt") as bar:
            try:
                asyncio.run(_compare(config, model, ready, context, seed, draft, bar, teach))
            except BudgetSpent as error:
                raise UserError(f"compare: {error}; see the logs of its workers") from None

    settings = {"compare": config.model_dump(mode="json"), "seed": recipe.seed}
    perform(run, PAIRS_STAGE, settings, parents, board, build)


async def _compare(
    config: CompareConfig,
    model: Path,
    prompts: Sequence[Prompt],
    context: int,
    seed: int,
    draft: Draft,
    bar: Bar,
    teach: Teaching | None,
) -> None:
    def spawn(name: str) -> Any:
        actor = ray.remote(TeacherWorker).options(**place_rollout(config.rollout))
        return actor.remote(name, model, config.rollout, context, derive_seed(seed, name))

    longest = config.sampling.max_tokens
    scorer = await hire_scorer(
        config.reward, config.judge, model, longest, draft.path, seed, "compare"
    )
    pool = RolloutPool(config.rollout, spawn, lambda worker, proof: None)
    slots = asyncio.Semaphore(
        max(1, _AHEAD * config.rollout.count * config.rollout.max_sequences // config.completions)
    )
    sampling = Sampling(**config.sampling.model_dump())

    async def answer(prompt: Prompt) -> tuple[list[Trajectory], Counter[str]]:
        async with slots:
            own = replace(sampling, seed=derive_seed(seed, prompt.id) % 2**31)
            try:
                rollout = await pool.generate(prompt, prompt.id, own, config.completions, oldest=0)
            except (PromptLost, ValueError) as error:
                return [], Counter({type(error).__name__: config.completions})
            scored = (await scorer.score(rollout.trajectories, prompt)).scored
            return list(scored.kept), Counter(r.reason for r in scored.rejected)

    try:
        await pool.start(WeightManifest(0, (), Canary((), ())))
        tasks = [asyncio.create_task(answer(prompt)) for prompt in prompts]
        await _write(config, prompts, tasks, draft, bar, teach)
    finally:
        pool.stop()
        scorer.stop()


async def _write(
    config: CompareConfig,
    prompts: Sequence[Prompt],
    tasks: Sequence[asyncio.Task[tuple[list[Trajectory], Counter[str]]]],
    draft: Draft,
    bar: Bar,
    teach: Teaching | None,
) -> None:
    """Everything that was sampled, its pairs and its verdicts, in the order of the prompts."""
    rejected: Counter[str] = Counter()
    pairs = completions = paired = verdicts = 0
    with (
        (draft.path / PAIRS_FILE).open("w", encoding="utf-8") as chosen,
        (draft.path / COMPLETIONS_FILE).open("w", encoding="utf-8") as everything,
        _open(draft.path / VERDICTS_FILE if teach else None) as taught,
    ):
        for done, (prompt, task) in enumerate(zip(prompts, tasks, strict=True), 1):
            kept, reasons = await task
            rejected += reasons
            completions += len(kept)
            for trajectory in kept:
                row = {
                    "id": prompt.id,
                    "prompt": prompt.text,
                    "completion": trajectory.text,
                    "reward": trajectory.reward,
                    "parts": trajectory.reward_parts,
                }
                everything.write(json.dumps(row) + "\n")
            found = make_pairs(prompt, kept, config.pairs, config.least_gap)
            chosen.writelines(json.dumps(row) + "\n" for row in found)
            pairs, paired = pairs + len(found), paired + bool(found)
            if teach is not None and taught is not None:
                lessons = teach(prompt, kept)
                taught.writelines(json.dumps(row) + "\n" for row in lessons)
                verdicts += len(lessons)
            bar.update(done, f"{pairs:,} pairs")
    if not pairs:
        told = ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none"
        raise UserError(
            f"compare: no two completions of a prompt have rewards more than "
            f"{config.least_gap:g} apart (rejected: {told}); raise compare.completions or "
            "compare.sampling.temperature, or check compare.reward"
        )
    draft.summary.update(
        pairs=pairs, completions=completions, prompts_without=len(prompts) - paired
    )
    if teach is not None:
        draft.summary.update(verdicts=verdicts)
    draft.summary.update({f"rejected/{reason}": count for reason, count in rejected.items()})


def _open(file: Path | None) -> AbstractContextManager[TextIO | None]:
    return nullcontext() if file is None else file.open("w", encoding="utf-8")


def _plan_lessons(config: VerdictsConfig | None, model: Path) -> Teaching | None:
    """What makes rows of `messages` of judged completions, where that is wanted. The judge is taken
    to have the special tokens of `model`. Raises `UserError` for a rubric that cannot be used."""
    if config is None:
        return None
    rubric = load_rubric(
        config.rubric, config.compare, config.scale, brief=True, where="compare.verdicts.rubric"
    )
    controls = list_special_tokens(load_tokenizer(model))

    def teach(prompt: Prompt, kept: Sequence[Trajectory]) -> list[dict[str, Any]]:
        texts, rewards = [t.text for t in kept], [t.reward or 0.0 for t in kept]
        return [
            {
                "id": prompt.id,
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": verdict},
                ],
            }
            for question, verdict in list_lessons(rubric, prompt, texts, rewards, controls)
        ]

    return teach


def make_pairs(
    prompt: Prompt, kept: Sequence[Trajectory], count: int, least_gap: float
) -> list[dict[str, Any]]:
    """Rows of `prompt`, `chosen` and `rejected` messages, and the `margin` of their rewards."""
    rewards = [trajectory.reward or 0.0 for trajectory in kept]
    texts = [trajectory.text for trajectory in kept]
    return [
        {
            "prompt": [{"role": "user", "content": prompt.text}],
            "chosen": [{"role": "assistant", "content": texts[better]}],
            "rejected": [{"role": "assistant", "content": texts[worse]}],
            "margin": rewards[better] - rewards[worse],
        }
        for better, worse in choose_pairs(rewards, texts, count, least_gap)
    ]


if __name__ == "__main__":
    main("compare", run)
