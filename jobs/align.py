"""Reinforcement learning: `python -m jobs.align recipe.yaml [align.key=value ...]`.

Rollout workers sample, reward workers or judges score, a learner group updates, and every new
policy version goes back to the rollout workers with a proof. Writes the `align` stage. A run that
was interrupted goes on where it was; `python -m jobs.scale RUN` changes how many workers one that
is going on has.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.controller import Controller, Crew
from actors.durable_learner import DurableLearner
from actors.journal import note_change, note_sync
from actors.learner import LearnerGroup, spawn_learner_worker
from actors.learner_rank import resolve_algorithm
from actors.placement import Placement, choose_route, place
from actors.rollout import spawn_rollout_worker
from actors.rollout_pool import RolloutPool
from actors.run_files import RunFiles
from actors.supervision import BudgetSpent
from jobs.align_journal import AlignJournal
from jobs.align_rows import spell_tokens
from jobs.asking import hire_scorer, locate_asked, prepare_asked
from jobs.entry import main, section
from jobs.intent import perform_alignment
from raylign.config import AlignConfig, Recipe, UserError
from raylign.data.packing import rows_for_step
from raylign.environments.rendering import TurnRenderer
from raylign.environments.source import load_environment
from raylign.inference.generator import AdapterForm
from raylign.models.adapters import outline_adapter
from raylign.models.loading import load_config, load_tokenizer
from raylign.records import Prompt
from raylign.rewards.hearing import check_judge
from raylign.rewards.panel import check_sources
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.sinks import build_sinks, check_sinks
from raylign.tracking import Bar, ProgressBoard
from raylign.training.checkpoints import retain
from raylign.training.critic import locate_critic
from raylign.training.loop import DIVERGED
from raylign.training.supervised import KEPT


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `align` stage."""
    config = section(recipe, "align", AlignConfig)
    model, prompts, parents = locate_asked(run, config.model, config.prompts, "align")
    check(config, model)

    def build(draft: Draft) -> None:
        if config.environment.source is not None:
            TurnRenderer(load_tokenizer(model))  # says what the template lacks
        ready, context = prepare_asked(model, prompts, config.sampling.max_tokens, "align")
        with board.bar("align", config.steps) as bar:
            align(config, model, ready, context, recipe.seed, draft, bar)

    perform_alignment(run, config, recipe.seed, parents, board, build)


def check(config: AlignConfig, model: Path | None = None) -> None:
    """What can be known to be wrong before anything is started; raises `UserError`. `model`: the
    policy's directory."""
    try:
        algorithm, _ = resolve_algorithm(config.algorithm)
    except ValueError as error:
        raise UserError(f"align.algorithm: {error}") from None
    if algorithm.needs_groups and config.group_size < 2:
        raise UserError(
            f"align.group_size={config.group_size}: {algorithm.name} compares the completions of a "
            "prompt with each other; give 2 or more, or choose an algorithm that needs no groups"
        )
    if "critic" in config.model_fields_set and not algorithm.needs_values:
        raise UserError(f"align.critic has no effect with {algorithm.name}; leave it out")
    if config.critic.model is not None and model is not None:
        locate_critic(config.critic.model, model)
    if config.algorithm.minibatches > config.prompts_per_step:
        raise UserError(
            f"align.algorithm.minibatches={config.algorithm.minibatches} of "
            f"align.prompts_per_step={config.prompts_per_step} groups: each needs one at least"
        )
    if algorithm.dynamic_sampling and config.sampling.temperature == 0:
        raise UserError(
            "align.sampling.temperature=0 gives the same completion every time, and "
            f"{algorithm.name} asks for others until they differ; raise it"
        )
    check_sources(config.reward, model)
    if config.environment.source is not None:
        load_environment(config.environment.source, config.environment.options)
    if config.rollout.backend == "vllm" and config.sampling.temperature > 2:
        raise UserError(
            f"align.sampling.temperature={config.sampling.temperature:g}: vLLM knows 0 to 2; lower "
            "it, or set align.rollout.backend=transformers"
        )
    check_sinks(config.sinks)
    if config.judge.model_fields_set:
        check_judge(config.judge, config.group_size)
    if config.rollout.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "align.rollout.backend=vllm, and vLLM is not installed; install raylign[cpu] or "
            "raylign[gpu], or set align.rollout.backend=transformers"
        )


class Curriculum:
    """Which prompts a step asks for, in passes over all of them; a function of seed and step."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed

    def choose(self, step: int, again: int, count: int) -> list[Prompt]:
        """`count` prompts of a step; `again`: of a later round, which draws for itself."""
        seed = self._seed if not again else derive_seed(self._seed, "again", again)
        rows = rows_for_step(len(self._prompts), seed, step, count)
        return [self._prompts[int(row)] for row in rows]

    def seed(self, request: str, attempt: int) -> int:
        """Of a request's completions; after a rollback they are others."""
        return derive_seed(self._seed, "rollout", attempt, request) % 2**31


def align(
    config: AlignConfig,
    model: Path,
    prompts: Sequence[Prompt],
    context: int,
    seed: int,
    draft: Draft,
    bar: Bar,
) -> None:
    """Learn, and leave model, books and rollouts in the draft. Raises `UserError`."""
    try:
        asyncio.run(_learn(config, model, prompts, context, seed, draft, bar))
    except BudgetSpent as error:
        role = next(role for role in ("rollout", "learner", "reward") if role in str(error))
        raise UserError(
            f"align: {error}; see the logs of its workers, or raise align.{role}.max_restarts"
        ) from None


async def _learn(
    config: AlignConfig,
    model: Path,
    prompts: Sequence[Prompt],
    context: int,
    seed: int,
    draft: Draft,
    bar: Bar,
) -> None:
    own, files = derive_seed(seed, "align"), RunFiles(draft.path)
    tokenizer = load_tokenizer(model)
    settings = {"align": config.model_dump(mode="json"), "seed": seed}
    journal = AlignJournal(
        draft.path,
        bar,
        {prompt.id: prompt for prompt in prompts},
        build_sinks(config.sinks, draft.path, settings),
        config.examples_every,
        partial(spell_tokens, tokenizer),
    )
    placement = place(config)
    scorer = await hire_scorer(
        config.reward, config.judge, model, config.longest, files.stage, own, "align"
    )
    crew = Crew(
        rollouts=_hire_rollouts(config, model, placement, context, own, journal),
        scorer=scorer,
        learner=_hire_learner(config, model, placement, prompts, own, files, journal),
    )
    controller = Controller(config, crew, Curriculum(prompts, own), journal, files)
    try:
        totals = await controller.run()
    finally:
        crew.rollouts.stop()
        scorer.stop()
        crew.learner.stop()
        journal.close()
    retain(files.checkpoints, draft.path / KEPT, config.checkpoints.after)
    draft.summary.update(journal.summary | controller.summary)
    draft.summary.update(dispatched=totals.dispatched, trained=totals.trained)
    draft.summary.update({f"dropped/{name}": count for name, count in totals.dropped.items()})


def _hire_rollouts(
    config: AlignConfig,
    model: Path,
    placement: Placement,
    context: int,
    seed: int,
    journal: AlignJournal,
) -> RolloutPool:
    adapter = None
    if config.transfer.adapter_only:
        adapter = AdapterForm(*outline_adapter(load_config(model), config.adapter))

    def spawn(name: str) -> Any:
        own, place = derive_seed(seed, name), placement.rollout
        more = (config.environment, adapter)
        return spawn_rollout_worker(name, place, model, config.rollout, context, own, *more)

    return RolloutPool(
        config.rollout,
        spawn,
        note_sync(journal),
        in_flight=config.in_flight,
        transfer_deadline_s=config.transfer.deadline_s,
        canary_tolerance=config.canary_tolerance,
        on_change=note_change(journal),
    )


def _hire_learner(
    config: AlignConfig,
    model: Path,
    placement: Placement,
    prompts: Sequence[Prompt],
    seed: int,
    files: RunFiles,
    journal: AlignJournal,
) -> DurableLearner:
    spawn = partial(
        spawn_learner_worker,
        options=placement.learner,
        model=model,
        config=config,
        seed=derive_seed(seed, "adapter"),
        transport=choose_route(config),
    )
    group = LearnerGroup(
        config, spawn, seed=derive_seed(seed, "minibatches"), kept=files.stage.parent / DIVERGED
    )
    canary = [prompt.token_ids for prompt in prompts]
    return DurableLearner(group, files, canary, config.learner.max_restarts, journal)


if __name__ == "__main__":
    main("align", run)
