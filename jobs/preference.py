"""Preference optimisation: `python -m jobs.preference recipe.yaml [preference.key=value ...]`.

A policy learns from judged answers without a reward model: DPO, IPO, KTO, ORPO, SimPO, cDPO or
robust DPO. What the reference policy thinks of every answer is computed once, before the first
step, and kept in the run for other stages on the same model and rows. Writes the `preference`
stage: `model/`, metrics, samples, and `rejected.jsonl` with the rows that could not be used.
`--show COUNT` prints so many training examples token by token, with what is scored, and trains
nothing; `--plan` prints what training will take.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jobs.plan import OPTION, answer_early, show_plan

if __name__ == "__main__":  # a plan needs nothing of what follows
    answer_early("preference")

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs import comparisons
from jobs.comparisons import ROWS, Source, check, locate_data, prepare_rows, print_examples
from jobs.entry import locate_start, locate_tokenizer, main, section
from jobs.intent import perform_training
from jobs.pretrain import compose_task, count_steps, plan_model, show
from raylign.algorithms.preference import Numbers, find_loss
from raylign.config import PreferenceConfig, Recipe, UserError
from raylign.models.heads import require_language_model
from raylign.models.loading import load_config, load_tokenizer, pad_id
from raylign.run import Draft, Run, hash_json
from raylign.runtime import derive_seed
from raylign.tracking import ProgressBoard
from raylign.training.comparisons import PreferenceObjective
from raylign.training.loop import SupervisedTask
from raylign.training.references import Reference
from raylign.training.supervised import train

STAGE = "preference"
CACHE = ".reference"
# What these learn is in front of the text from the first step on: they do not begin as the base.
_IN_FRONT = ("prefix", "prompt")


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `preference` stage."""
    config = section(recipe, STAGE, PreferenceConfig)
    parents = {}
    model, parents["model"] = locate_start(run, config.model, "sft", "sft", f"{STAGE}.model")
    data, parents["data"] = locate_data(run, config.data, STAGE)
    policy: Path | None = None
    if config.reference is not None:
        policy, parents["reference"] = locate_start(
            run, config.reference, "sft", "sft", f"{STAGE}.reference"
        )
    elif config.peft in _IN_FRONT:
        policy = model

    def build(draft: Draft) -> None:
        tokenizer = load_tokenizer(model)
        check_models(config, model, policy, tokenizer)
        rows = prepare_rows(_find_source(config, data), tokenizer, recipe.seed, draft, board)
        if config.loss == "kto":
            say_balance(config, draft, board)
        known = parents.get("reference", parents["model"])
        cache = run.root / CACHE / name_scores(config, known, rows, policy is None)
        reference = Reference(cache, policy, config.micro_batch_size)
        task = plan(recipe.seed, config, model, tokenizer, reference, draft)
        with board.bar(STAGE, task.steps) as bar:
            draft.summary.update(train(task, config.workers, bar))
        show(draft, board)
        comparisons.show(draft, board)

    perform_training(run, STAGE, config, recipe.seed, parents, board, build)


def show_examples(count: str, recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """`--show COUNT`: the first training examples, and what became of every row."""
    config = section(recipe, STAGE, PreferenceConfig)
    model = locate_tokenizer(run, config.model, "sft", "sft", f"{STAGE}.model")
    data, _ = locate_data(run, config.data, STAGE)
    tokenizer = load_tokenizer(model)
    check_models(config, model, None, tokenizer)
    print_examples(count, _find_source(config, data), tokenizer, recipe.seed)


def check_models(
    config: PreferenceConfig,
    model: Path,
    policy: Path | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Model, reference, tokenizer and rows must fit each other; raises `UserError`."""
    require_language_model(model, f"{STAGE}.model")
    check(config, STAGE, model, tokenizer)
    if policy is None or policy == model:
        return
    require_language_model(policy, f"{STAGE}.reference")
    if load_tokenizer(policy).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{STAGE}.reference={policy} has another tokenizer than {model}; its log-probs would "
            "be of other tokens: choose a reference with the same one"
        )
    context = load_config(policy).max_position_embeddings
    if config.max_length > context:
        raise UserError(
            f"{STAGE}.max_length={config.max_length} exceeds the context of {policy}, {context} "
            "tokens; lower it"
        )


def name_scores(config: PreferenceConfig, policy: str, rows: str, as_trained: bool) -> str:
    """A name for what a reference says: of all that decides it, and of nothing else.

    policy, rows: hashes of its weights and of the rows' tokens. as_trained: whether it is the
    policy in training before its first step, which qlora computes from quantised weights.
    """
    quantised = as_trained and config.peft == "qlora"
    named = {
        "policy": policy,
        "rows": rows,
        "dtype": config.engine.dtype,
        "quantised": quantised and (config.adapter.quantization or "nf4"),
    }
    return hash_json(named)[:16]


def choose_numbers(config: PreferenceConfig) -> Numbers:
    """The recipe's numbers, and the authors' where it says nothing."""
    usual = find_loss(config.loss).numbers
    beta = usual.beta if config.beta is None else config.beta
    margin = usual.margin / usual.beta * beta

    def choose(given: float | None, otherwise: float) -> float:
        return otherwise if given is None else given

    return Numbers(
        beta=beta,
        label_smoothing=choose(config.label_smoothing, usual.label_smoothing),
        margin=choose(config.simpo_margin, margin),
        desirable_weight=choose(config.desirable_weight, usual.desirable_weight),
        undesirable_weight=choose(config.undesirable_weight, usual.undesirable_weight),
    )


def say_balance(config: PreferenceConfig, draft: Draft, board: ProgressBoard) -> None:
    """How the weighted numbers of good and bad answers compare, when they are out of balance."""
    labels = np.load(draft.path / ROWS / "train.values.npy") > 0.5
    good, bad = int(labels.sum()), int((~labels).sum())
    draft.summary.update(desirable=good, undesirable=bad)
    numbers = choose_numbers(config)
    if not good or not bad:
        raise UserError(
            f"{STAGE}.data holds {good} desirable and {bad} undesirable answers; kto needs both"
        )
    ratio = numbers.desirable_weight * good / (numbers.undesirable_weight * bad)
    if not 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:
        board.say(
            f"  [yellow]{good:,} desirable and {bad:,} undesirable answers[/] weigh {ratio:.2f} to "
            "1; kto's authors keep that between 1 and 1.33, by desirable_weight or "
            "undesirable_weight"
        )


def plan(
    seed: int,
    config: PreferenceConfig,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference,
    draft: Draft,
) -> SupervisedTask:
    """The task as every rank gets it."""
    return compose_task(
        config,
        name=STAGE,
        output=draft.path,
        model=plan_model(config, model, derive_seed(seed, STAGE, "weights")),
        tokenizer=model,
        objective=PreferenceObjective(
            draft.path / ROWS,
            config.loss,
            choose_numbers(config),
            pad_id(tokenizer),
            config.sft_weight,
            reference if find_loss(config.loss).needs_reference else None,
            comparisons.may_share_prompts(config, model),
        ),
        seed=derive_seed(seed, STAGE, "order"),
        steps=count_steps(STAGE, config, draft.summary["rows"]),
        prompts=tuple((text, _ask(text, tokenizer)) for text in config.sample_prompts),
        sample_tokens=config.sample_tokens,
    )


def _find_source(config: PreferenceConfig, data: Path) -> Source:
    labelled = config.loss == "kto"
    return Source(STAGE, config, "labelled" if labelled else "pairs", data, strangers=labelled)


def _ask(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A question as the model sees it; plain text where there is no chat template."""
    if not tokenizer.chat_template:
        return tuple(tokenizer(text)["input_ids"])
    question = [{"role": "user", "content": text}]
    found = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    return tuple(found["input_ids"])


if __name__ == "__main__":
    main(STAGE, run, {"--show COUNT": show_examples, OPTION: partial(show_plan, STAGE)})
