"""What a training stage will take: `python -m jobs.STAGE recipe.yaml [key=value ...] --plan`.

Parameters, operations, the batch, the run against Chinchilla's budget, memory, disk and time. Made
from the recipe, `config.json` and what the run holds already, in about a second: nothing heavy is
imported, nothing is started and nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from raylign.config import (
    ModelConfig,
    PreferenceConfig,
    PrepareConfig,
    PretrainConfig,
    Recipe,
    RewardModelConfig,
    SftConfig,
    TrainingConfig,
    UserError,
    load_recipe,
)
from raylign.models.budget import Blueprint, count, count_adapter
from raylign.models.catalog import read_choice, write_fields
from raylign.models.hub import locate_config
from raylign.run import Run
from raylign.tracking import METRICS_FILE, ProgressBoard, read_lines
from raylign.training.outlook import Outlook, RowPlan, check_arithmetic

OPTION = "--plan"
# Where a stage begins when its recipe does not say.
BEFORE = {"sft": "pretrain", "reward_model": "sft", "preference": "sft"}
# `tokenizer.vocab_size` when not given, and about as many characters as a language of letters has.
_VOCABULARY, _CHARACTERS = 1024, 128


def answer_early(stage: str) -> None:
    """End the process with the plan if that is asked for; called before a job's heavy imports."""
    if OPTION in sys.argv[1:]:
        main(stage)


def main(stage: str) -> NoReturn:
    """Print the plan; status 2 and one line on stderr for a mistake of the user."""
    arguments = [argument for argument in sys.argv[1:] if argument != OPTION]
    if not arguments or arguments[0] in ("-h", "--help"):
        usage = f"usage: python -m jobs.{stage} RECIPE.yaml [section.key=value ...] {OPTION}\n"
        sys.stderr.write(usage)
        raise SystemExit(0 if arguments else 2)
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        show_plan(stage, recipe, Run(recipe.run))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    raise SystemExit(0)


def show_plan(stage: str, recipe: Recipe, run: Run, board: ProgressBoard | None = None) -> None:
    """The plan on standard output, once all of it is known."""
    lines = [f"{title:<12}{text}\n" for title, text in explain(recipe, run, stage)]
    sys.stdout.write("".join(lines))


def explain(recipe: Recipe, run: Run, stage: str) -> Iterator[tuple[str, str]]:
    """(title, text) of each line. Raises `UserError` for arithmetic that cannot be."""
    config = getattr(recipe, stage)
    if config is None:
        raise UserError(
            f"the recipe has no {stage!r} section; add one (`{stage}: {{}}` takes all defaults)"
        )
    blueprint, source = find_blueprint(recipe, run, stage)
    rows = find_rows(recipe, run, stage, config)
    check_arithmetic(config, blueprint, rows, stage)
    trainable = count_adapter(blueprint, config.peft, config.adapter, f"{stage}.adapter")
    if config.peft != "none":
        trainable += blueprint.head if blueprint.scores else 0  # a new head is learnt whole
    outlook = Outlook(stage, config, blueprint, rows, trainable)
    yield from outlook.explain_model(source)
    yield from outlook.explain_batch()
    yield from outlook.explain_length()
    yield from outlook.explain_memory()
    yield from outlook.explain_disk(shutil.disk_usage(_find_existing(run.root)).free)
    yield from outlook.explain_time(_find_speed(run, stage, outlook), run.root)


def find_blueprint(recipe: Recipe, run: Run, stage: str) -> tuple[Blueprint, str]:
    """The model that `stage` trains, and where its numbers come from."""
    config = getattr(recipe, stage)
    if stage == "pretrain":
        choice = read_choice(config.model, "pretrain.model")
        if isinstance(choice, ModelConfig):
            return _initialised(recipe, run, choice)
        given: str | None = choice
    else:
        given = config.model
    if given is not None:
        blueprint, source = _read_config(locate_config(given, f"{stage}.model"))
    elif (done := run.find(BEFORE[stage])) is not None:
        blueprint, source = _read_config(locate_config(done.path, f"{stage}.model"))
    elif getattr(recipe, BEFORE[stage]) is not None:
        blueprint, source = find_blueprint(recipe, run, BEFORE[stage])
    else:
        run.require(BEFORE[stage], BEFORE[stage])
    if isinstance(config, RewardModelConfig):
        steps = config.kind == "process"  # right and wrong, with a bias each
        blueprint = dataclasses.replace(blueprint, scores=1 + steps, head_bias=steps)
    return blueprint, source


def _read_config(file: Path) -> tuple[Blueprint, str]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(fields, dict)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{file} is not a JSON object ({error}); copy the model again") from None
    return count(fields, str(file)), str(file)


def _initialised(recipe: Recipe, run: Run, shape: ModelConfig) -> tuple[Blueprint, str]:
    """A shape, with the vocabulary of the tokenizer that is or will be there."""
    entries, source = _find_vocabulary(recipe, run)
    if shape.vocab_size is not None:
        if entries is not None and entries > shape.vocab_size:
            raise UserError(
                f"the tokenizer has {entries:,} entries and the model vocab_size="
                f"{shape.vocab_size:,}; choose the model's own tokenizer, or another vocab_size"
            )
        entries, source = shape.vocab_size, "pretrain.model"
    if entries is None:
        config = recipe.tokenizer
        guess = _CHARACTERS if config is not None and config.kind == "char" else _VOCABULARY
        entries, source = guess, "a guess: the tokenizer will tell"
    return count(write_fields(shape, entries)), f"{shape.preset or 'a shape'}; vocabulary: {source}"


def _find_vocabulary(recipe: Recipe, run: Run) -> tuple[int | None, str]:
    """Entries of the tokenizer, None when they are not known yet, and what says so."""
    assert recipe.pretrain is not None
    done = run.find("tokenizer")
    if recipe.pretrain.tokenizer is not None:
        file = recipe.pretrain.tokenizer / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"pretrain.tokenizer={file.parent}: holds no tokenizer.json")
        return _count_entries(file), str(file)
    if done is not None:
        return int(done.manifest.summary["vocab_size"]), str(done.path)
    if recipe.tokenizer is not None and recipe.tokenizer.vocab_size is not None:
        return recipe.tokenizer.vocab_size, "tokenizer.vocab_size"
    return None, ""


def _count_entries(file: Path) -> int:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        listed = stored["model"]["vocab"]
        ids = listed.values() if isinstance(listed, dict) else range(len(listed))
        return 1 + max([*ids, *(token["id"] for token in stored["added_tokens"])])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); copy the tokenizer again") from None


def find_rows(recipe: Recipe, run: Run, stage: str, config: TrainingConfig) -> RowPlan:
    """Rows as they are on disk, or as the recipe will have them."""
    if isinstance(config, SftConfig):
        return RowPlan(1, config.sequence_length)
    if isinstance(config, RewardModelConfig):
        return RowPlan(2 if config.kind == "pairs" else 1, config.max_length)
    if isinstance(config, PreferenceConfig):
        return RowPlan(1 if config.loss == "kto" else 2, config.max_length)
    assert isinstance(config, PretrainConfig)
    done = run.find("shards")
    directory = config.corpus or (done.path if done is not None else None)
    if directory is None:
        stored = (recipe.prepare or PrepareConfig()).sequence_length
        return RowPlan(1, choose_length(config, stored))
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        split, stored = index["splits"]["train"], int(index["sequence_length"])
        length = choose_length(config, stored)
        return RowPlan(1, length, split["rows"] * (stored // length), split["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"pretrain.corpus={directory}: holds no readable index.json; give packed shards"
        ) from None


def choose_length(config: PretrainConfig, stored: int) -> int:
    """Tokens in a row of training; raises `UserError` when shards of rows of `stored` tokens cannot
    be cut so."""
    length = config.sequence_length or stored
    if stored % length:
        raise UserError(
            f"pretrain.sequence_length={length} does not divide the shards' rows of {stored} "
            "tokens; choose a divisor"
        )
    return length


def _find_speed(run: Run, stage: str, outlook: Outlook) -> float | None:
    """Tokens a second of an earlier run of this stage on such a model, finished or not."""
    done, size = run.find(stage), outlook.blueprint.total
    if done is not None:
        found = done.manifest.summary.get("parameters")
        if found not in (size, size + outlook.trainable):  # an adapter's are counted too
            return None
    places = [run.root / stage, *run.root.glob(f".{stage}.*")]
    files = [place / METRICS_FILE for place in places if (place / METRICS_FILE).is_file()]
    measured = [
        float(row["tokens_per_second"])
        for row in (read_lines(files[0]) if files else [])
        if row.get("tokens_per_second")
    ]
    return statistics.median(measured[-20:]) if measured else None


def _find_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
