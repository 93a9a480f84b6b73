"""Synthetic documents: `python -m jobs.synthesise recipe.yaml [synthesise.key=value ...]`.

A model served by rollout workers writes textbook sections, exercises and more from topics and
excerpts; what passes the filters becomes the `synthetic` stage, documents with their provenance.
Answers are kept beside it as they come: a run that was killed pays for none of them twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.teacher import Request, TeacherPool
from jobs.entry import locate, main, model_directory, perform, section
from raylign.config import Recipe, SamplingConfig, SynthesiseConfig, UserError
from raylign.data.synthesis.answers import Answer, AnswerCache, request_key
from raylign.data.synthesis.documents import Output, PartWriter, Tally, Teacher
from raylign.data.synthesis.filters import PROMPT_TOO_LONG, OutputFilter, read_answer
from raylign.data.synthesis.prompts import (
    DrawnPrompt,
    Excerpt,
    Material,
    draw_excerpts,
    draw_prompts,
    read_lines_of,
)
from raylign.data.synthesis.styles import choose_styles
from raylign.inference.generator import Sampling
from raylign.models.loading import load_config, load_tokenizer
from raylign.run import Draft, Run, write_json
from raylign.runtime import derive_seed
from raylign.tracking import Bar, ProgressBoard

# What the documents do not depend on: changing it leaves a finished stage valid. Of the workers'
# settings, the number format changes what they sample.
RESOURCE_KEYS = {"rollout", "cache"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt's sample, and the seed it is drawn with."""

    prompt: DrawnPrompt
    sample: int
    seed: int


class Questioner:
    """Turns text into requests for one model: template, tokens, key, and what is known already."""

    def __init__(
        self,
        model: Path,
        content: str,
        sampling: SamplingConfig,
        dtype: str,
        max_length: int,
        chat: bool | None,
    ) -> None:
        """`chat` None asks through the chat template where there is one. Raises `UserError` when
        it is demanded and missing, or the longest answer leaves no room for a prompt."""
        self.tokenizer = load_tokenizer(model)
        if chat and not self.tokenizer.chat_template:
            raise UserError(
                f"{model} has no chat template to ask through; set prompting=completion"
            )
        self.chat = bool(self.tokenizer.chat_template) if chat is None else chat
        self.max_length = min(max_length, int(load_config(model).max_position_embeddings))
        if sampling.max_tokens >= self.max_length:
            raise UserError(
                f"sampling.max_tokens={sampling.max_tokens} leaves no room for a prompt in the "
                f"{self.max_length} tokens of {model}; lower it"
            )
        self._content, self._sampling, self._dtype = content, sampling, dtype

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens that ask `text`."""
        if not self.chat:
            return tuple(self.tokenizer(text)["input_ids"])
        return tuple(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )

    def request(
        self, tokens: tuple[int, ...], sample: int, seed: int, cache: AnswerCache, payload: Any
    ) -> Request[Any]:
        """A request for sample `sample`; one that does not fit the context is answered so."""
        sampling = self._sampling.model_dump() | {"seed": seed, "dtype": self._dtype}
        key = request_key(self._content, sampling, tokens, sample)
        if not tokens or len(tokens) + self._sampling.max_tokens > self.max_length:
            return Request(key, tokens, seed, Answer("", PROMPT_TOO_LONG, 0, 0), payload)
        return Request(key, tokens, seed, cache.get(key), payload)


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `synthetic` stage."""
    config = section(recipe, "synthesise", SynthesiseConfig)
    if config.model is None:
        raise UserError("synthesise.model: give the directory of the model that writes")
    path, model_hash = locate(run, config.model, "", "", "synthesise.model")
    model = model_directory(path)
    parents = {"model": model_hash}
    for key in ("seeds", "topics", "audiences"):
        given = getattr(config, key)
        if isinstance(given, Path):
            parents[key] = locate(run, given, "", "", f"synthesise.{key}")[1]
    seed = derive_seed(recipe.seed, "synthesise")
    teacher = Teacher(path.name, model_hash, config.sampling.model_dump())

    def build(draft: Draft) -> None:
        chat = None if config.prompting == "auto" else config.prompting == "chat"
        questioner = Questioner(
            model, teacher.content, config.sampling, config.rollout.dtype, config.max_length, chat
        )
        prompts = plan_prompts(config, questioner.chat, seed)
        with (
            AnswerCache(config.cache or run.root / ".synthetic.cache") as cache,
            board.bar("synthetic", config.prompts * config.samples, unit="output") as bar,
        ):
            desk = _Desk(config, model, questioner, teacher, cache, seed)
            asyncio.run(desk.write(prompts, draft, bar))
        _report(draft, board)

    settings = {
        "synthesise": config.model_dump(mode="json", exclude=RESOURCE_KEYS)
        | {"dtype": config.rollout.dtype},
        "seed": recipe.seed,
    }
    perform(run, "synthetic", settings, parents, board, build)


def plan_prompts(config: SynthesiseConfig, chat: bool, seed: int) -> Iterator[DrawnPrompt]:
    """The prompts of a recipe, in the order they are asked."""
    seeds: tuple[Excerpt, ...] = ()
    if config.seeds is not None:
        seeds = draw_excerpts(
            config.seeds, config.seed_documents, config.seed_chars, derive_seed(seed, "seeds")
        )
    material = Material(
        topics=read_lines_of(config.topics, "synthesise.topics"),
        audiences=read_lines_of(config.audiences, "synthesise.audiences"),
        seeds=seeds,
    )
    styles = choose_styles(config.styles, material.present, chat)
    return draw_prompts(styles, material, config.prompts, seed)


class _Desk:
    """Asks, judges and writes."""

    def __init__(
        self,
        config: SynthesiseConfig,
        model: Path,
        questioner: Questioner,
        teacher: Teacher,
        cache: AnswerCache,
        seed: int,
    ) -> None:
        self._config, self._model, self._questioner = config, model, questioner
        self._teacher, self._cache, self._seed = teacher, cache, seed

    async def write(self, prompts: Iterator[DrawnPrompt], draft: Draft, bar: Bar) -> None:
        """Outputs are judged in the order of their prompts, so that the same are accepted however
        fast each was answered."""
        config = self._config
        filters, tally = OutputFilter(config.filters), Tally()
        parts = PartWriter(draft.path, self._teacher, config.part_samples)
        pool = TeacherPool(
            config.rollout,
            self._model,
            self._questioner.max_length,
            self._seed,
            "synthesise.rollout",
        )
        sampling = Sampling(**config.sampling.model_dump())
        answers = pool.answer(self._requests(prompts), sampling, self._cache.put)
        try:
            async with aclosing(answers):
                async for request, answer in answers:
                    output = _judge(request, answer, filters)
                    parts.add(output)
                    tally.add(output)
                    bar.update(
                        tally.outputs,
                        f"{tally.accepted} accepted  {pool.tokens_per_second():,.0f} tokens/s",
                    )
                    if config.target is not None and tally.accepted >= config.target:
                        break
        finally:
            pool.stop()
        parts.close()
        if tally.outputs and tally.reasons[PROMPT_TOO_LONG] == tally.outputs:
            raise UserError(
                f"synthesise: no prompt fits: with sampling.max_tokens={config.sampling.max_tokens}"
                f" each exceeds the {self._questioner.max_length} tokens of {self._model}; lower "
                "it, or synthesise.seed_chars"
            )
        write_json(draft.path / "tally.json", tally.to_json())
        draft.summary.update(
            tally.to_json(),
            generated=pool.generated,
            generated_tokens=pool.generated_tokens,
            tokens_per_second=round(pool.tokens_per_second(), 1),
        )

    def _requests(self, prompts: Iterator[DrawnPrompt]) -> Iterator[Request[Asked]]:
        for prompt in prompts:
            tokens = self._questioner.encode(prompt.text)
            for sample in range(self._config.samples):
                seed = derive_seed(self._seed, prompt.hash, sample)
                asked = Asked(prompt, sample, seed)
                yield self._questioner.request(tokens, sample, seed, self._cache, asked)


def _judge(request: Request[Asked], answer: Answer, filters: OutputFilter) -> Output:
    asked = request.payload
    form = asked.prompt.style.answer
    text = read_answer(answer, form)
    reasons = filters.judge(text, answer.finish_reason, asked.prompt.text, form)
    return Output(request.key, asked.prompt, asked.sample, asked.seed, answer, text, tuple(reasons))


def _report(draft: Draft, board: ProgressBoard) -> None:
    found = draft.summary
    share = found["accepted"] / max(found["outputs"], 1)
    board.say(
        f"accepted {found['accepted']:,} of {found['outputs']:,} outputs ({share:.1%}), "
        f"{found['accepted_tokens']:,} of {found['tokens']:,} tokens; generated "
        f"{found['generated']:,} now, {found['tokens_per_second']:,.0f} tokens/s"
    )
    for reason, count in sorted(found["rejected_for"].items(), key=lambda item: -item[1]):
        board.say(f"  rejected, {reason}: {count:,}")
    if not found["accepted"]:
        board.say(
            "[yellow]no output was accepted[/]; read them in rejected/, mend the prompts or "
            "synthesise.filters, and rerun with redo=synthetic: answers are kept"
        )


if __name__ == "__main__":
    main("synthesise", run)
