"""The judge of a run: a model on vLLM workers of its own, or behind an endpoint, as a scorer.

The workers are a rollout pool whose weights never change. It grows by itself while calls queue up,
and shrinks again when none come.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedTokenizerBase

from actors.placement import place_rollout, require_room
from actors.reward import Scores
from actors.rollout_pool import RolloutPool
from actors.supervision import BudgetSpent, PromptLost
from actors.teacher import TeacherWorker
from actors.weights import Canary, WeightManifest
from raylign.config import JudgeConfig, UserError
from raylign.data.chat.faults import list_special_tokens
from raylign.inference.endpoint import CallFailed, CallRefused, Endpoint, QuestionTooLong, Reply
from raylign.inference.generator import Sampling
from raylign.models.loading import load_config, load_tokenizer
from raylign.records import Prompt, Trajectory
from raylign.rewards.hearing import Hearings, check_judge
from raylign.rewards.judging import JudgeTally, advise_workers
from raylign.rewards.opinions import Judge, Opinion
from raylign.rewards.outcomes import Rejection, Scored, reject
from raylign.rewards.rubric import Rubric, load_rubric
from raylign.runtime import derive_seed

log = logging.getLogger(__name__)

PART = "judge"
"""What its number is called among the parts of a reward."""

_LONGEST_CONTEXT = 8192
"""A judge's engine keeps room for one text of this length; no question needs more."""

_VERDICT_TOKENS = 40
"""Of a verdict without its reason, at most."""


@dataclass(frozen=True, slots=True)
class Tempo:
    """How fast the pool reacts."""

    pause_s: float = 0.5
    """First pause after a failed call."""
    look_s: float = 1.0
    """Between two looks at the queue."""
    idle_s: float = 60.0
    """Without any call before a worker goes."""


class JudgePool:
    """Scores completions by asking a language model."""

    def __init__(
        self,
        config: JudgeConfig,
        directory: Path,
        seed: int,
        *,
        model: Path | None = None,
        content: str = "",
        tempo: Tempo | None = None,
    ) -> None:
        """Verdicts are kept in `judge/` of the stage's `directory`. `model` has the weights of
        `judge.model`, where that is a stage, and `content` their hash, which verdicts are kept
        under.

        Raises `UserError` for a rubric, a key, or a model that cannot be used.
        """
        check_judge(config)
        self._config, self._seed = config, seed
        self._directory = directory / "judge"
        self._tempo = tempo or Tempo()
        self._rubric = load_rubric(config.rubric, config.compare, config.scale, config.brief)
        self._tally = JudgeTally()
        self._source: JudgeEndpoint | JudgeWorkers
        if config.endpoint is not None:
            self._source = JudgeEndpoint(config, self._rubric.schema())
            self._model = f"{config.endpoint} {config.endpoint_model}"
        else:
            assert config.model is not None
            self._source = JudgeWorkers(
                config, self._rubric, model or config.model, derive_seed(seed, "judge")
            )
            self._model = f"{content or config.model} {config.rollout.dtype}"
        self._hearings: Hearings | None = None
        self._judge: Judge | None = None
        self._governor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start workers, or reach the endpoint. Raises `UserError` when that cannot be done."""
        await self._source.start()
        identity = f"{self._model} {self._rubric.identity()}"
        self._hearings = Hearings(
            self._source.ask,
            self._config,
            self._directory,
            identity,
            self._seed,
            self._tally,
            self._tempo.pause_s,
        )
        controls = self._source.controls
        self._judge = Judge(self._rubric, self._config, self._hearings, self._tally, controls)
        if isinstance(self._source, JudgeWorkers):
            self._governor = asyncio.create_task(self._govern(self._source, self._hearings))

    async def consider(self, trajectories: Sequence[Trajectory], prompt: Prompt) -> Opinion:
        """What the judge makes of completions of `prompt`, and whom it prefers to whom.

        Raises `UserError` when it cannot be asked anything any more.
        """
        assert self._judge is not None, "start() first"
        group = trajectories[0].group_id if trajectories else ""
        seed = derive_seed(self._seed, "pairs", prompt.id, group)
        texts = [trajectory.text for trajectory in trajectories]
        return await self._judge.consider(prompt.text, texts, prompt.reference, seed)

    async def measure(
        self, trajectories: Sequence[Trajectory], prompt: Prompt
    ) -> list[float | Rejection]:
        """A number in 0..1 for each completion of `prompt`, or why there is none."""
        opinion = await self.consider(trajectories, prompt)
        return [
            value if isinstance(value, float) else reject(trajectory, value.reason, value.detail)
            for trajectory, value in zip(trajectories, opinion.values, strict=True)
        ]

    async def score(self, trajectories: tuple[Trajectory, ...], prompt: Prompt) -> Scores:
        """The judge's numbers as the whole reward."""
        start = time.time()
        values = await self.measure(trajectories, prompt)
        scored = Scored([], [])
        for trajectory, value in zip(trajectories, values, strict=True):
            if isinstance(value, Rejection):
                scored.rejected.append(value)
            else:
                scored.kept.append(trajectory.scored(value, {PART: value}))
        return Scores(scored, PART, start, time.time())

    async def scale(self, count: int) -> str:
        """Have `count` workers from now on, whatever the queue; what was done, in words.

        Raises `UserError` for an endpoint, less than one worker, or no room for more.
        """
        if not isinstance(self._source, JudgeWorkers):
            raise UserError(f"judges={count}: the judge is an endpoint and has no workers here")
        if self._governor is not None:
            self._governor.cancel()
            await asyncio.gather(self._governor, return_exceptions=True)
            self._governor = None
        return await self._source.scale(count)

    def take_metrics(self) -> dict[str, float]:
        """Of what happened since the last call: counts, and the means that are defined."""
        found = self._tally.take()
        if isinstance(self._source, JudgeWorkers):
            found["judge/workers"] = float(self._source.count)
        return found

    def stop(self) -> None:
        """Give up what is being asked, and kill all workers."""
        if self._governor is not None:
            self._governor.cancel()
        if self._hearings is not None:
            self._hearings.stop()
        self._source.stop()

    async def _govern(self, workers: JudgeWorkers, hearings: Hearings) -> None:
        """More workers while calls queue up, fewer when none come."""
        config, idle_since, refused = self._config, time.monotonic(), -self._tempo.idle_s
        while True:
            await asyncio.sleep(self._tempo.look_s)
            now = time.monotonic()
            if hearings.waiting:
                idle_since = now
            elif now - idle_since < self._tempo.idle_s:
                continue
            if hearings.waiting and now - refused < self._tempo.idle_s:
                continue
            least = config.rollout.count
            wanted = advise_workers(
                hearings.waiting, workers.count, least, config.most, config.scale_queue
            )
            if wanted == workers.count:
                continue
            try:
                log.info("judges: %s", await workers.scale(wanted))
            except (UserError, BudgetSpent) as error:
                refused = now
                log.warning("the judge stays at %d workers: %s", workers.count, error)


class JudgeEndpoint:
    """Asks a service."""

    controls: tuple[str, ...] = ()

    def __init__(self, config: JudgeConfig, schema: dict[str, Any]) -> None:
        assert config.endpoint is not None and config.endpoint_model is not None
        self._endpoint = Endpoint(
            config.endpoint, config.endpoint_model, config.key_file, config.timeout_s
        )
        self._config, self._schema = config, schema
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises `UserError` when it cannot be reached."""
        await self._endpoint.start()

    async def ask(self, question: str, seed: int) -> Reply:
        """One answer, as by `Endpoint.ask`."""
        return await self._endpoint.ask(
            question,
            self._schema,
            temperature=self._config.temperature,
            max_tokens=self._config.max_tokens,
            seed=seed,
        )

    def stop(self) -> None:
        """Close its connections; those of a loop that has ended are closed already."""
        with suppress(RuntimeError):
            self._closing = asyncio.get_running_loop().create_task(self._endpoint.close())


class JudgeWorkers:
    """Asks workers that serve the judge's own weights, through its own chat template."""

    def __init__(self, config: JudgeConfig, rubric: Rubric, model: Path, seed: int) -> None:
        """Raises `UserError` when the longest verdict leaves no room for a question."""
        self._config, self._options = config, place_rollout(config.rollout)
        self._tokenizer = load_tokenizer(model)
        positions = int(load_config(model).max_position_embeddings)
        self._max_length = max_length = min(positions, _LONGEST_CONTEXT)
        if config.max_tokens >= max_length:
            raise UserError(
                f"align.judge.max_tokens={config.max_tokens} leaves no room for a question in the "
                f"{max_length} tokens of {model}; lower it"
            )
        self.controls = tuple(list_special_tokens(self._tokenizer))
        schema = None
        if config.rollout.backend == "vllm" and _spells_json(self._tokenizer):
            schema = json.dumps(rubric.schema(max(config.max_tokens - _VERDICT_TOKENS, 0)))
        self._sampling = Sampling(
            temperature=config.temperature, max_tokens=config.max_tokens, schema=schema
        )
        self._names = (f"question-{number}" for number in itertools.count())

        def spawn(name: str) -> Any:
            actor = ray.remote(TeacherWorker).options(**self._options)
            own = derive_seed(seed, name)
            return actor.remote(name, model, config.rollout, max_length, own)

        self._pool = RolloutPool(config.rollout, spawn, lambda worker, proof: None, role="judge")

    @property
    def count(self) -> int:
        """Workers, those that are still starting too."""
        return len(self._pool.names)

    async def start(self) -> None:
        """Raises `UserError` when the cluster is too small or workers do not start."""
        require_room(self._options, self._config.rollout.count, "align.judge.rollout")
        try:
            await self._pool.start(WeightManifest(0, (), Canary((), ())))
        except BudgetSpent as error:
            raise self._ended(error) from None

    async def ask(self, question: str, seed: int) -> Reply:
        """One answer. Raises `QuestionTooLong`, `CallFailed`, `CallRefused`, or `UserError` when no
        worker is left."""
        tokens = self._encode(question)
        longest = self._config.max_tokens
        if len(tokens) + longest > self._max_length:
            raise QuestionTooLong(
                f"{len(tokens)} tokens and a verdict of {longest} exceed {self._max_length}"
            )
        name = next(self._names)
        prompt = Prompt(name, tokens, "", "")
        try:
            async with asyncio.timeout(self._config.timeout_s):
                own = replace(self._sampling, seed=seed)
                rollout = await self._pool.generate(prompt, name, own, 1, oldest=0)
        except TimeoutError:
            raise CallFailed(f"no verdict in {self._config.timeout_s:g} s") from None
        except PromptLost as error:
            raise CallRefused(str(error)) from None
        except BudgetSpent as error:
            raise self._ended(error) from None
        except ValueError as error:
            raise CallRefused(str(error)) from None
        answer = rollout.trajectories[0]
        return Reply(answer.text, answer.finish_reason, answer.sampled_tokens)

    async def scale(self, count: int) -> str:
        """Have `count` workers. Raises `UserError` when they cannot be had."""
        if count < 1:
            raise UserError(f"judges={count}: at least 1 worker must stay")
        if count > self.count:
            require_room(self._options, count - self.count, "align.judge.rollout")
        return await self._pool.scale(count)

    def stop(self) -> None:
        """Kill all workers."""
        self._pool.stop()

    def _encode(self, question: str) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            return tuple(self._tokenizer(question)["input_ids"])
        turns = [{"role": "user", "content": question}]
        return tuple(
            self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
        )

    def _ended(self, error: BudgetSpent) -> UserError:
        return UserError(
            f"align.judge.rollout: {error}; see its worker's log, and check model and memory"
        )


def _spells_json(tokenizer: PreTrainedTokenizerBase) -> bool:
    """A vocabulary of whole words could not begin what it is held to."""
    verdict = '{"reason":"a","score":10}'
    return verdict in tokenizer.decode(tokenizer(verdict)["input_ids"], skip_special_tokens=True)
