"""Supervised fine-tuning: `python -m jobs.sft recipe.yaml [sft.key=value ...]`.

Learns from demonstrations, on the tokens of the roles in `train_on` only. Several conversations
share a row and do not see each other. Writes the `sft` stage: `model/`, metrics, samples, and
`rejected.jsonl` with the rows that could not be used.
`--show COUNT` prints so many training examples token by token, with the mask, and trains nothing;
`--plan` prints what training will take.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from jobs.plan import OPTION, answer_early, show_plan

if __name__ == "__main__":  # a plan needs nothing of what follows
    answer_early("sft")

from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from jobs.entry import locate, locate_start, locate_tokenizer, main, section
from jobs.examples import print_examples
from jobs.intent import perform_training
from jobs.pretrain import compose_task, count_steps, plan_model, show
from raylign.config import Recipe, SftConfig, UserError
from raylign.data.chat import (
    Conversation,
    Demonstrations,
    find_closing,
    read_demonstrations,
    require_enough,
    write_rejections,
)
from raylign.models.loading import load_config, load_tokenizer, pad_id
from raylign.models.windows import require_separable
from raylign.run import Draft, Run
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard
from raylign.training.loop import SupervisedTask
from raylign.training.objectives import LanguageObjective
from raylign.training.rows import write_demonstrations
from raylign.training.supervised import train

_ROWS = ".rows"
REJECTED_FILE = "rejected.jsonl"
_PEEKED = 100


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `sft` stage."""
    config = section(recipe, "sft", SftConfig)
    parents = {}
    model, parents["model"] = locate_start(run, config.model, "pretrain", "pretrain", "sft.model")
    data, parents["data"] = _locate_data(run, config)

    def build(draft: Draft) -> None:
        tokenizer = load_tokenizer(model)
        check(config, model, tokenizer)
        rows = draft.path / _ROWS
        prepare_rows(config, data, tokenizer, recipe.seed, rows, draft, board)
        task = plan(recipe.seed, config, model, tokenizer, rows, draft)
        with board.bar("sft", task.steps) as bar:
            draft.summary.update(train(task, config.workers, bar))
        show(draft, board)

    perform_training(run, "sft", config, recipe.seed, parents, board, build)


def show_examples(count: str, recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """`--show COUNT`: the first training examples, and what became of every row."""
    config = section(recipe, "sft", SftConfig)
    if not count.isdecimal():
        raise UserError(f"--show {count}: give the number of examples, like --show 3")
    model = locate_tokenizer(run, config.model, "pretrain", "pretrain", "sft.model")
    tokenizer = load_tokenizer(model)
    check(config, model, tokenizer)
    data, _ = _locate_data(run, config)
    found = read(config, data, tokenizer)
    if found.rows:
        examples = list(found.conversations)
        if found.rows > 1:
            examples, _ = split(found.conversations, config.validation_share, recipe.seed)
        print_examples(
            examples[: int(count)], data, found.format, describe(found, tokenizer), tokenizer
        )
    require_enough(data, found, config.max_rejected_share)
    split(found.conversations, config.validation_share, recipe.seed)  # training would say so too


def check(config: SftConfig, model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Model, tokenizer and rows must fit each other; raises `UserError`."""
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
    if config.packing:
        require_separable(shape, config.sequence_length, config.peft, "sft.packing")
    if not config.train_on:
        raise UserError("sft.train_on names no role; give at least one, such as [assistant]")
    if config.neftune_alpha and config.engine.pipeline_parallel > 1:
        raise UserError(
            "sft.neftune_alpha does not work with sft.engine.pipeline_parallel; leave one out"
        )


def read(config: SftConfig, data: Path, tokenizer: PreTrainedTokenizerBase) -> Demonstrations:
    """The demonstrations, however many of them cannot be used."""
    return read_demonstrations(
        data,
        tokenizer,
        config.sequence_length,
        max_rejected_share=1.0,
        format=config.format,
        train_on=config.train_on,
        too_long=config.too_long,
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
    """Tokenise, split off the validation share, and lay both parts into rows."""
    found = read(config, data, tokenizer)
    write_rejections(found.rejected, draft.path / REJECTED_FILE)
    require_enough(data, found, config.max_rejected_share)
    train_part, validation = split(found.conversations, config.validation_share, seed)
    counts = {}
    for name, part in (("train", train_part), ("validation", validation)):
        counts[name] = write_demonstrations(
            part, config.sequence_length, pad_id(tokenizer), directory, name, config.packing
        )
    reasons = Counter(rejection.reason for rejection in found.rejected)
    draft.summary.update(
        format=found.format,
        conversations=len(found.conversations),
        rows=counts["train"],
        trained_tokens=sum(int(c.trained.sum()) for c in train_part),
        ends_with=find_closing(found.conversations[:_PEEKED], tokenizer),
        truncated=found.truncated,
        rejected=len(found.rejected),
        rejected_reasons=dict(reasons),
    )
    for line in describe(found, tokenizer):
        board.say(escape(f"  {line}"))


def describe(found: Demonstrations, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What was found in the data, in lines."""
    tokens = sum(len(c.token_ids) for c in found.conversations)
    trained = sum(int(c.trained.sum()) for c in found.conversations)
    lines = [
        f"{found.rows:,} demonstrations ({found.format}): {tokens:,} tokens, {trained:,} of them "
        f"trained ({trained / max(1, tokens):.0%})"
    ]
    split_up = len(found.conversations) - found.rows
    if split_up:
        lines.append(f"{split_up:,} more examples, where the chat template rewrites earlier turns")
    if found.truncated:
        lines.append(f"{found.truncated:,} cut at sequence_length")
    closing = find_closing(found.conversations[:_PEEKED], tokenizer)
    if closing is None:
        lines.append("no answer ends with a special token: the model will not learn to stop")
    elif closing != tokenizer.eos_token:
        lines.append(
            f"answers end with {closing}, and the tokenizer's eos_token is {tokenizer.eos_token}: "
            "the model's configuration will name both"
        )
    return lines + [f"left out: {line}" for line in found.describe()]


def split(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, validation), drawn by seed; both keep at least one row, and what comes of a row stays
    together. Raises `UserError` for fewer than two rows."""
    rows = list(dict.fromkeys(conversation.row for conversation in conversations))
    if len(rows) < 2:
        raise UserError("sft.data holds one demonstration; validation needs a second one")
    held = min(len(rows) - 1, max(1, round(share * len(rows))))
    drawn = random.Random(derive_seed(seed, "sft", "validation")).sample(range(len(rows)), held)
    chosen = {rows[index] for index in drawn}
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        parts[conversation.row in chosen].append(conversation)
    return parts


def _locate_data(run: Run, config: SftConfig) -> tuple[Path, str]:
    """The file of demonstrations and its content hash."""
    data, content = locate(run, config.data, "corpus", "prepare", "sft.data")
    return (data / "exercises.jsonl" if data.is_dir() else data), content


def plan(
    seed: int,
    config: SftConfig,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Path,
    draft: Draft,
) -> SupervisedTask:
    """The task as every rank gets it."""
    noise = derive_seed(seed, "sft", "noise")
    model_plan = plan_model(config, model, derive_seed(seed, "sft", "weights"))
    closing = draft.summary["ends_with"]
    stops = () if closing is None else (tokenizer.convert_tokens_to_ids(closing),)
    return compose_task(
        config,
        name="sft",
        output=draft.path,
        model=replace(model_plan, stops=stops),
        tokenizer=model,
        objective=LanguageObjective(
            rows, "demonstrations", noise=config.neftune_alpha, noise_seed=noise
        ),
        seed=derive_seed(seed, "sft", "order"),
        steps=count_steps("sft", config, draft.summary["rows"]),
        prompts=tuple((text, _ask(text, tokenizer)) for text in config.sample_prompts),
        sample_tokens=config.sample_tokens,
    )


def _ask(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A question as the model sees it; plain text where there is no chat template."""
    if not tokenizer.chat_template:
        return tuple(tokenizer(text)["input_ids"])
    question = [{"role": "user", "content": text}]
    found = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    return tuple(found["input_ids"])


if __name__ == "__main__":
    main("sft", run, {"--show COUNT": show_examples, OPTION: partial(show_plan, "sft")})
