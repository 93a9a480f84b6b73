"""What the jobs that sample from a policy have in common: whom they ask, what, and who scores."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from actors.judge import JudgePool
from actors.placement import place_reward
from actors.reward import RewardPool, spawn_reward_worker
from actors.scoring import CompositeScorer
from jobs.entry import locate, model_directory
from raylign.config import JudgeConfig, RewardConfig, UserError
from raylign.models.folding import require_plain
from raylign.models.loading import load_config, load_tokenizer, require_chat_template
from raylign.records import Prompt
from raylign.run import Run, content_hash
from raylign.runtime import derive_seed


def locate_asked(
    run: Run, model: Path | None, prompts: Path | None, stage: str
) -> tuple[Path, Path, dict[str, str]]:
    """The policy's directory, the file of prompts, and the content hashes of both: what `stage`
    names, or the run's own. Raises `UserError`."""
    policy, model_hash = locate(run, model, "sft", "sft", f"{stage}.model")
    file, prompts_hash = locate(run, prompts, "corpus", "prepare", f"{stage}.prompts")
    if file.is_dir():
        file = file / "prompts.jsonl"
    return model_directory(policy), file, {"model": model_hash, "prompts": prompts_hash}


def prepare_asked(
    model: Path, prompts: Path, max_tokens: int, stage: str
) -> tuple[list[Prompt], int]:
    """The prompts as the policy reads them, and its context in tokens.

    Raises `UserError` for a policy that cannot be asked, and as `read_prompts`.
    """
    tokenizer = load_tokenizer(model)
    require_chat_template(tokenizer, model)
    require_plain(model)
    context = int(load_config(model).max_position_embeddings)
    return read_prompts(prompts, tokenizer, context, max_tokens, stage), context


def read_prompts(
    file: Path, tokenizer: Any, context: int, max_tokens: int, stage: str = "align"
) -> list[Prompt]:
    """Rows of `prompt` and `reference` through the chat template.

    Raises `UserError` naming file and line for a row that is malformed or does not fit the context.
    """
    if not file.is_file():
        raise UserError(f"{stage}.prompts: {file} does not exist")
    prompts = []
    # Not splitlines(): a JSON string may hold U+2028 and its like, which that takes for ends.
    lines = _read_text(file).removesuffix("\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], 1):
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
                f"{place}: prompt of {len(tokens)} tokens and {stage}.sampling.max_tokens="
                f"{max_tokens} exceed the model's context of {context}; shorten either"
            )
        prompts.append(Prompt(str(row.get("id", number)), tuple(tokens), text, reference))
    if not prompts:
        raise UserError(f"{stage}.prompts: {file} is empty")
    return prompts


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise UserError(
            f"{file}:{number}: not UTF-8 (byte {byte:#04x}); save the file as UTF-8"
        ) from None


async def hire_scorer(
    reward: RewardConfig,
    judge: JudgeConfig,
    policy: Path,
    longest: int,
    directory: Path,
    seed: int,
    stage: str,
) -> CompositeScorer:
    """Reward workers, and a judge if one is asked, which is reached, or started, first.

    longest: completion, in tokens. directory: where verdicts are kept. Raises `UserError`.
    """
    sources = {part.source for part in reward.parts.values()} or {reward.source}
    judges = None
    if "judge" in sources:
        judges = await _hire_judge(judge, directory, derive_seed(seed, "judge"), stage)
    workers = None
    if sources != {"judge"}:
        spawn = partial(
            spawn_reward_worker, options=place_reward(reward), config=reward, policy=policy
        )
        workers = RewardPool(reward, spawn)
    return CompositeScorer(reward, longest, workers, judges)


async def _hire_judge(config: JudgeConfig, directory: Path, seed: int, stage: str) -> JudgePool:
    """A judge that can be asked; its verdicts are kept by the content of its model."""
    served, content = None, ""
    if config.model is not None:
        if not config.model.is_dir():
            raise UserError(f"{stage}.judge.model={config.model}: no such directory")
        served, content = model_directory(config.model), content_hash(config.model)
    judge = JudgePool(config, directory, seed, model=served, content=content)
    await judge.start()
    return judge
