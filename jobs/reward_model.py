"""Reward models: `python -m jobs.reward_model recipe.yaml [reward_model.key=value ...]`.

A score for answers learned from comparisons (Bradley-Terry) or from right and wrong ones, or a
score for each of their steps. Writes the `reward_model` stage: `model/`, which transformers loads
as a model for sequence (or, of steps, token) classification, metrics, and `rejected.jsonl` with the
rows that could not be used.
`--show COUNT` prints so many training examples token by token, with what is scored, and trains
nothing; `--plan` prints what training will take.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jobs.plan import OPTION, answer_early, show_plan

if __name__ == "__main__":  # a plan needs nothing of what follows
    answer_early("reward_model")

from transformers import PreTrainedTokenizerBase

from jobs import comparisons
from jobs.comparisons import ROWS, Source, check, locate_data, prepare_rows, print_examples
from jobs.entry import locate_start, locate_tokenizer, main, section
from jobs.intent import perform_training
from jobs.pretrain import compose_task, count_steps, plan_model, show
from raylign.config import Recipe, RewardModelConfig
from raylign.data.preferences import Kind
from raylign.models.assembly import Head
from raylign.models.loading import load_tokenizer, pad_id
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard
from raylign.training.comparisons import RewardObjective
from raylign.training.loop import SupervisedTask
from raylign.training.supervised import train

STAGE = "reward_model"
_KINDS: dict[str, Kind] = {"pairs": "pairs", "outcome": "labelled", "process": "steps"}


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `reward_model` stage."""
    config = section(recipe, STAGE, RewardModelConfig)
    parents = {}
    model, parents["model"] = locate_start(run, config.model, "sft", "sft", f"{STAGE}.model")
    data, parents["data"] = locate_data(run, config.data, STAGE)

    def build(draft: Draft) -> None:
        tokenizer = load_tokenizer(model)
        check(config, STAGE, model, tokenizer)
        prepare_rows(_find_source(config, data), tokenizer, recipe.seed, draft, board)
        task = plan(recipe.seed, config, model, tokenizer, draft)
        with board.bar(STAGE, task.steps) as bar:
            draft.summary.update(train(task, config.workers, bar))
        show(draft, board)
        comparisons.show(draft, board)

    perform_training(run, STAGE, config, recipe.seed, parents, board, build)


def show_examples(count: str, recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """`--show COUNT`: the first training examples, and what became of every row."""
    config = section(recipe, STAGE, RewardModelConfig)
    model = locate_tokenizer(run, config.model, "sft", "sft", f"{STAGE}.model")
    data, _ = locate_data(run, config.data, STAGE)
    tokenizer = load_tokenizer(model)
    check(config, STAGE, model, tokenizer)
    at_end = None if config.kind == "process" else pad_id(tokenizer)
    print_examples(count, _find_source(config, data), tokenizer, recipe.seed, at_end)


def plan(
    seed: int,
    config: RewardModelConfig,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    draft: Draft,
) -> SupervisedTask:
    """The task as every rank gets it."""
    head: Head = "steps" if config.kind == "process" else "score"
    return compose_task(
        config,
        name=STAGE,
        output=draft.path,
        model=plan_model(config, model, derive_seed(seed, STAGE, "weights"), head),
        tokenizer=model,
        objective=RewardObjective(
            draft.path / ROWS,
            config.kind,
            pad_id(tokenizer),
            config.centring,
            comparisons.may_share_prompts(config, model),
        ),
        seed=derive_seed(seed, STAGE, "order"),
        steps=count_steps(STAGE, config, draft.summary["rows"]),
        prompts=(),
        sample_tokens=1,
    )


def _find_source(config: RewardModelConfig, data: Path) -> Source:
    return Source(STAGE, config, _KINDS[config.kind], data, config.step_separator)


if __name__ == "__main__":
    main(STAGE, run, {"--show COUNT": show_examples, OPTION: partial(show_plan, STAGE)})
