"""Pre-training: `python -m jobs.pretrain recipe.yaml [pretrain.key=value ...]`.

Next-token prediction on packed shards, from a shape or from existing weights. Writes the `pretrain`
stage: a plain Hugging Face directory `model/`, metrics and samples. `--plan` prints what it will
take, and trains nothing.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from jobs.plan import OPTION, answer_early, choose_length, show_plan

if __name__ == "__main__":  # a plan needs nothing of what follows
    answer_early("pretrain")

from rich.markup import escape
from transformers import PreTrainedConfig

from jobs.entry import locate, locate_start, main, section
from jobs.intent import perform_training
from raylign.config import (
    ModelConfig,
    PretrainConfig,
    Recipe,
    TrainingConfig,
    UserError,
    check_warmup,
)
from raylign.data.packing import PackedShards
from raylign.models.assembly import Head, ModelPlan
from raylign.models.catalog import read_choice
from raylign.models.hub import is_hub_name
from raylign.models.loading import load_config, load_tokenizer, pad_id
from raylign.models.presets import build_config
from raylign.models.windows import require_separable
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard
from raylign.training.loop import SupervisedTask
from raylign.training.objectives import LanguageObjective
from raylign.training.sampling import compare_samples
from raylign.training.supervised import train

SHOWN = 70
"""Letters of a sample on the board."""


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `pretrain` stage."""
    config = section(recipe, "pretrain", PretrainConfig)
    parents = {}
    shards, parents["shards"] = locate(run, config.corpus, "shards", "prepare", "pretrain.corpus")
    tokenizer, parents["tokenizer"] = locate(
        run, config.tokenizer, "tokenizer", "tokenizer", "pretrain.tokenizer"
    )
    start: Path | ModelConfig
    choice = read_choice(config.model, "pretrain.model")
    if isinstance(choice, str):
        start, parents["model"] = locate_start(
            run, choice, "pretrain", "pretrain", "pretrain.model"
        )
    else:
        start = choice

    def build(draft: Draft) -> None:
        rows = PackedShards(shards)
        if rows.tokenizer != parents["tokenizer"]:
            raise UserError(
                f"shards {shards} were made with another tokenizer than {tokenizer}; name theirs "
                "in pretrain.tokenizer, or prepare the shards again"
            )
        length = choose_length(config, rows.sequence_length)
        model = choose_model(start, tokenizer, rows, length)
        if config.isolate_documents:
            require_separable(model, length, config.peft, "pretrain.isolate_documents")
        task = plan(
            recipe.seed,
            config,
            start if isinstance(start, Path) else model,
            shards,
            rows.rows * (rows.sequence_length // length),
            tokenizer,
            draft,
        )
        with board.bar("pretrain", task.steps) as bar:
            draft.summary.update(train(task, config.workers, bar))
        show(draft, board)

    perform_training(run, "pretrain", config, recipe.seed, parents, board, build)


def choose_model(
    start: ModelConfig | Path, tokenizer: Path, rows: PackedShards, length: int
) -> PreTrainedConfig:
    """Configuration of the model to train on `rows` in pieces of `length` tokens; raises
    `UserError` when it does not fit them."""
    if isinstance(start, ModelConfig):
        loaded = load_tokenizer(tokenizer)
        model = build_config(start, len(loaded), pad_id=pad_id(loaded), eos_id=loaded.eos_token_id)
        context = "pretrain.model.context"
    else:
        model = load_config(start)
        context = f"the context of {start}"
        require_same_tokenizer(start, tokenizer)
    vocabulary = model.vocab_size
    if length > model.max_position_embeddings:
        raise UserError(
            f"{context}={model.max_position_embeddings} is shorter than rows of {length} tokens; "
            "raise it, or lower pretrain.sequence_length or prepare.sequence_length"
        )
    if rows.vocab_size > vocabulary:
        raise UserError(
            f"the shards hold {rows.vocab_size} different tokens and the model knows {vocabulary}; "
            "prepare them with the model's tokenizer"
        )
    if not rows.rows:
        raise UserError("the shards hold no rows to train on; prepare more text")
    return model


def require_same_tokenizer(start: Path, tokenizer: Path) -> None:
    """Raises `UserError` when the model in `start` comes with another one than the shards'."""
    if not (start / "tokenizer_config.json").is_file():
        return  # it does not say
    if load_tokenizer(start).get_vocab() != load_tokenizer(tokenizer).get_vocab():
        raise UserError(
            f"pretrain.model={start} comes with another tokenizer than the shards' ({tokenizer}), "
            "in which the same numbers are other tokens; prepare the shards with the model's own"
        )


def plan(
    seed: int,
    config: PretrainConfig,
    start: Path | PreTrainedConfig,
    shards: Path,
    rows: int,
    tokenizer: Path,
    draft: Draft,
) -> SupervisedTask:
    """The task as every rank gets it."""
    spell = load_tokenizer(tokenizer)
    prompts = (
        (text, spell.encode(text, add_special_tokens=False)) for text in config.sample_prompts
    )
    return compose_task(
        config,
        name="pretrain",
        output=draft.path,
        model=plan_model(config, start, derive_seed(seed, "pretrain", "weights")),
        tokenizer=tokenizer,
        objective=LanguageObjective(
            shards, "corpus", config.isolate_documents, config.sequence_length
        ),
        seed=derive_seed(seed, "pretrain", "order"),
        steps=count_steps("pretrain", config, rows),
        prompts=tuple((text, tuple(ids)) for text, ids in prompts),
        sample_tokens=config.sample_tokens,
        sample_temperature=config.sample_temperature,
    )


def compose_task(config: TrainingConfig, **own: Any) -> SupervisedTask:
    """A stage's task: what every training section says of it, and `own`, which its job says."""
    return SupervisedTask(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        checkpoint_every=config.checkpoint_every,
        optimizer=config.optimizer,
        schedule=config.schedule,
        engine=config.engine,
        threads=config.workers.threads,
        checkpoints=config.checkpoints,
        **own,
    )


def plan_model(
    config: TrainingConfig, start: Path | PreTrainedConfig, seed: int, head: Head = "language"
) -> ModelPlan:
    """The model as every rank builds it."""
    named = getattr(config, "model", None)
    # A hub name means the same to everyone who is given the adapter; a directory's place may not.
    hub = isinstance(named, str) and is_hub_name(named) and not Path(named).exists()
    return ModelPlan(
        start,
        seed,
        head,
        config.peft,
        config.adapter,
        base=named if hub else None,
        dtype=config.engine.dtype,
    )


def count_steps(name: str, config: TrainingConfig, rows: int) -> int:
    """Optimizer steps: as many as given, or as the given passes over `rows` rows take. Raises
    `UserError` when those are too few for the warm-up."""
    if config.epochs is None:
        return config.steps
    steps = max(1, math.ceil(config.epochs * rows / config.batch_size))
    try:
        check_warmup(config.schedule, f"epochs={config.epochs:g}, {steps} steps", steps)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return steps


def show(draft: Draft, board: ProgressBoard) -> None:
    """The outcome of a supervised stage, in one line."""
    found = draft.summary
    checked = found["validation_loss"]
    validation = "" if checked is None else f", validation {checked:.3f}"
    board.say(
        f"  {found['parameters']:,} parameters, {found['tokens'] / 1e6:.1f} M tokens at "
        f"{found['tokens_per_second']:,.0f} a second; loss {found['initial_loss']:.3f} to "
        f"{found['loss']:.3f}{validation}"
    )
    if "peft" in found:
        _show_adapter(draft, board)
    for prompt, before, after in compare_samples(draft.path):
        board.say(f"  [dim]{_cut(prompt)}[/]\n    {_cut(before)} [dim]->[/] {_cut(after)}")


def _show_adapter(draft: Draft, board: ProgressBoard) -> None:
    """What was trained in place of all weights, in one line, and what can be done with it."""
    found = draft.summary
    count = found["trained_parameters"]
    total = count / found["trained_share"]
    kinds = ", ".join(
        f"{name} {part / total:.2%}" for name, part in found["trained_by_kind"].items()
    )
    board.say(f"  {found['peft']}: {count:,} parameters trained, {count / total:.2%}: {kinds}")
    if not (draft.path / "model").is_dir():
        board.say(
            f"  [yellow]no model/: a {found['peft']} adapter cannot be folded into one;[/] "
            "adapter/ serves with the transformers backend, and no stage trains on from it"
        )


def _cut(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return escape(line if len(line) <= SHOWN else f"{line[:SHOWN]}…")


if __name__ == "__main__":
    main("pretrain", run, {OPTION: partial(show_plan, "pretrain")})
