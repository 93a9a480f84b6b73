"""Reinforcement learning: `python -m jobs.align recipe.yaml [align.key=value ...]`.

Rollout workers sample, reward workers score, a learner group updates, and every new policy version
goes back to the rollout workers with a proof. Writes the `align` stage.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.buffer import Group
from actors.controller import Controller, Crew, note_sync
from actors.learner import LearnerGroup, resolve_algorithm, spawn_learner_workers
from actors.placement import Placement, place
from actors.reward import RewardPool, spawn_reward_worker
from actors.rollout import RolloutPool, spawn_rollout_worker
from jobs.entry import locate, main, model_directory, perform, section
from raylign.config import AlignConfig, Recipe, UserError
from raylign.data.packing import rows_for_step
from raylign.models.folding import require_plain
from raylign.models.loading import load_config, load_tokenizer, require_chat_template
from raylign.records import Prompt
from raylign.rewards.source import load_reward
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.tracking import Bar, JsonTracker, ProgressBoard


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `align` stage."""
    config = section(recipe, "align", AlignConfig)
    model, model_hash = locate(run, config.model, "sft", "sft", "align.model")
    model = model_directory(model)
    prompts, prompts_hash = locate(run, config.prompts, "corpus", "prepare", "align.prompts")
    if prompts.is_dir():
        prompts = prompts / "prompts.jsonl"
    check(config)
    seed = derive_seed(recipe.seed, "align")

    def build(draft: Draft) -> None:
        tokenizer = load_tokenizer(model)
        require_chat_template(tokenizer, model)
        require_plain(model)
        context = int(load_config(model).max_position_embeddings)
        ready = read_prompts(prompts, tokenizer, context, config.sampling.max_tokens)
        with board.bar("align", config.steps) as bar:
            asyncio.run(_learn(config, model, ready, context, seed, draft, bar))

    settings = {"align": config.model_dump(mode="json"), "seed": recipe.seed}
    perform(run, "align", settings, {"model": model_hash, "prompts": prompts_hash}, board, build)


def check(config: AlignConfig) -> None:
    """What can be known to be wrong before anything is started; raises `UserError`."""
    try:
        algorithm, _ = resolve_algorithm(config.algorithm)
    except ValueError as error:
        raise UserError(f"align.algorithm.name: {error}") from None
    if algorithm.needs_groups and config.group_size < 2:
        raise UserError(
            f"align.group_size={config.group_size}: {algorithm.name} compares the completions of a "
            "prompt with each other; give 2 or more, or choose an algorithm that needs no groups"
        )
    load_reward(config.reward.source)
    if config.rollout.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "align.rollout.backend=vllm, and vLLM is not installed; install raylign[cpu] or "
            "raylign[gpu], or set align.rollout.backend=transformers"
        )


def read_prompts(file: Path, tokenizer: Any, context: int, max_tokens: int) -> list[Prompt]:
    """Rows of `prompt` and `reference` through the chat template.

    Raises `UserError` naming file and line for a row that is malformed or does not fit the context.
    """
    if not file.is_file():
        raise UserError(f"align.prompts: {file} does not exist")
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{file}:{number}"
        try:
            row = json.loads(line)
            text, reference = row["prompt"], str(row["reference"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place}: not a row with `prompt` and `reference` ({error})") from None
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        if len(tokens) + max_tokens > context:
            raise UserError(
                f"{place}: prompt of {len(tokens)} tokens and align.sampling.max_tokens="
                f"{max_tokens} exceed the model's context of {context}; shorten either"
            )
        prompts.append(Prompt(str(row.get("id", number)), tuple(tokens), text, reference))
    if not prompts:
        raise UserError(f"align.prompts: {file} is empty")
    return prompts


async def _learn(
    config: AlignConfig,
    model: Path,
    prompts: Sequence[Prompt],
    context: int,
    seed: int,
    draft: Draft,
    bar: Bar,
) -> None:
    journal = _FileJournal(draft.path, bar, {p.id: p for p in prompts})
    crew = _assemble(config, model, context, seed, place(config), journal)

    def choose(step: int) -> list[Prompt]:
        rows = rows_for_step(len(prompts), seed, step, config.prompts_per_step)
        return [prompts[int(row)] for row in rows]

    def checkpoint(version: int) -> Path:
        last = version == config.steps
        return draft.path / ("model" if last else f"checkpoints/version-{version}")

    try:
        await Controller(config, crew, choose, journal, checkpoint).run()
    finally:
        crew.rollouts.stop()
        crew.rewards.stop()
        crew.learner.stop()
        journal.close()
    draft.summary.update(journal.summary)


def _assemble(
    config: AlignConfig,
    model: Path,
    context: int,
    seed: int,
    placement: Placement,
    journal: _FileJournal,
) -> Crew:
    def rollout(name: str) -> Any:
        own = derive_seed(seed, name)
        return spawn_rollout_worker(name, placement.rollout, model, config.rollout, context, own)

    reward = partial(spawn_reward_worker, options=placement.reward, config=config.reward)
    own = derive_seed(seed, "adapter")
    workers = spawn_learner_workers(placement.learner, model, config, own)
    return Crew(
        rollouts=RolloutPool(config.rollout, rollout, note_sync(journal)),
        rewards=RewardPool(config.reward, reward),
        learner=LearnerGroup(workers, config),
    )


class _FileJournal:
    """The stage's metrics, events and examples, and its line on the board."""

    def __init__(self, directory: Path, bar: Bar, prompts: Mapping[str, Prompt]) -> None:
        self._tracker, self._bar, self._prompts = JsonTracker(directory), bar, prompts
        self._examples = (directory / "examples.jsonl").open("a", encoding="utf-8")
        self.summary: dict[str, float] = {}

    def event(self, **fields: Any) -> None:
        self._tracker.event(**fields)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(step, metrics)
        note = (
            f"reward {metrics['reward/total']:.2f}  length {metrics['length']:.0f}  "
            f"kl {metrics.get('kl', 0.0):.3f}  mismatch {metrics.get('mismatch/mean_abs', 0.0):.1e}"
        )
        self._bar.update(step + 1, note)
        self.summary["steps"] = step + 1
        self.summary.setdefault("reward_first", metrics["reward/total"])
        self.summary["reward_last"] = metrics["reward/total"]
        for name in ("samples", "sampled_tokens"):
            self.summary[name] = self.summary.get(name, 0) + metrics[name]
        worst = max(self.summary.get("mismatch_worst", 0.0), metrics.get("mismatch/mean_abs", 0.0))
        self.summary["mismatch_worst"] = worst
        for name, value in metrics.items():
            if name.startswith("dropped/"):
                self.summary[name] = self.summary.get(name, 0) + value

    def examples(self, step: int, groups: Sequence[Group], version: int) -> None:
        for group in [g for g in groups if g.trajectories][:2]:
            prompt = self._prompts[group.trajectories[0].prompt_id]
            row = {
                "step": step,
                "prompt": prompt.text,
                "reference": prompt.reference,
                "completions": [
                    {
                        "text": t.text,
                        "reward": t.reward,
                        "parts": t.reward_parts,
                        "version": t.version_span[0],
                    }
                    for t in sorted(group.trajectories, key=lambda t: -(t.reward or 0.0))
                ],
            }
            self._examples.write(json.dumps(row) + "\n")
        self._examples.flush()

    def close(self) -> None:
        self._tracker.close()
        self._examples.close()


if __name__ == "__main__":
    main("align", run)
