"""Supervised fine-tuning: `python -m jobs.sft recipe.yaml [sft.key=value ...]`.

Learns from chat demonstrations, on the assistant's tokens only. Several conversations share a row
and do not see each other. Writes the `sft` stage: `model/`, metrics and samples.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jobs.entry import locate, locate_start, main, perform, section
from jobs.pretrain import count_steps, plan_model, show
from raylign.config import Recipe, SftConfig, UserError
from raylign.data.chat import Conversation, read_demonstrations
from raylign.models.loading import load_config, load_tokenizer, pad_id, require_chat_template
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard
from raylign.training.loop import SupervisedTask
from raylign.training.objectives import LanguageObjective
from raylign.training.rows import write_demonstrations
from raylign.training.supervised import train

_ROWS = ".rows"


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `sft` stage."""
    config = section(recipe, "sft", SftConfig)
    parents = {}
    model, parents["model"] = locate_start(run, config.model, "pretrain", "pretrain", "sft.model")
    data, parents["data"] = locate(run, config.data, "corpus", "prepare", "sft.data")
    data = data / "exercises.jsonl" if data.is_dir() else data

    def build(draft: Draft) -> None:
        tokenizer = load_tokenizer(model)
        check(config, model, tokenizer)
        rows = draft.path / _ROWS
        prepare_rows(config, data, tokenizer, recipe.seed, rows, draft, board)
        task = plan(recipe.seed, config, model, tokenizer, rows, draft)
        with board.bar("sft", task.steps) as bar:
            draft.summary.update(train(task, config.workers, bar))
        show(draft, board)

    settings = {"sft": config.model_dump(mode="json"), "seed": recipe.seed}
    perform(run, "sft", settings, parents, board, build, config.checkpoints.resume == "auto")


def check(config: SftConfig, model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Model, tokenizer and rows must fit each other; raises `UserError`."""
    require_chat_template(tokenizer, model)
    shape = load_config(model)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the tokenizer of {model} has {len(tokenizer)} entries and its model "
            f"{shape.vocab_size}; sft.model must name a directory whose parts fit"
        )
    if config.sequence_length > shape.max_position_embeddings:
        raise UserError(
            f"sft.sequence_length={config.sequence_length} exceeds the context of {model}, "
            f"{shape.max_position_embeddings} tokens; lower it"
        )


def prepare_rows(
    config: SftConfig,
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
    draft: Draft,
    board: ProgressBoard,
) -> None:
    """Tokenise, split off the validation share, and pack both parts into rows."""
    found = read_demonstrations(data, tokenizer, config.sequence_length)
    train_part, validation = split(found.conversations, config.validation_share, seed)
    counts = {}
    for name, part in (("train", train_part), ("validation", validation)):
        counts[name] = write_demonstrations(
            part, config.sequence_length, pad_id(tokenizer), directory, name
        )
    reasons = Counter(rejection.reason for rejection in found.rejected)
    draft.summary.update(
        conversations=len(found.conversations),
        rows=counts["train"],
        rejected=len(found.rejected),
        rejected_reasons=dict(reasons),
    )
    for reason, count in reasons.most_common():
        board.say(f"  [yellow]{count:,} demonstrations left out:[/] {reason}")


def split(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, validation), drawn by seed; both keep at least one. Raises `UserError` for fewer
    than two conversations."""
    if len(conversations) < 2:
        raise UserError("sft.data holds one demonstration; validation needs a second one")
    held = min(len(conversations) - 1, max(1, round(share * len(conversations))))
    drawn = random.Random(derive_seed(seed, "sft", "validation")).sample(
        range(len(conversations)), held
    )
    chosen = set(drawn)
    train_part = [c for index, c in enumerate(conversations) if index not in chosen]
    return train_part, [conversations[index] for index in sorted(chosen)]


def plan(
    seed: int,
    config: SftConfig,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Path,
    draft: Draft,
) -> SupervisedTask:
    """The task as every rank gets it."""
    prompts = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in config.sample_prompts
    )
    return SupervisedTask(
        name="sft",
        output=draft.path,
        model=plan_model(config, model, derive_seed(seed, "sft", "weights")),
        tokenizer=model,
        objective=LanguageObjective(rows, "demonstrations"),
        seed=derive_seed(seed, "sft", "order"),
        steps=count_steps(config, draft.summary["rows"]),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        checkpoint_every=config.checkpoint_every,
        optimizer=config.optimizer,
        schedule=config.schedule,
        engine=config.engine,
        threads=config.workers.threads,
        prompts=tuple(
            (text, tuple(ids)) for text, ids in zip(config.sample_prompts, prompts, strict=True)
        ),
        sample_tokens=config.sample_tokens,
    )


if __name__ == "__main__":
    main("sft", run)
