"""Rollout workers: a generator, and the environments of its episodes, behind a Ray actor.

A worker is handed requests and asked for its pulse: what it has finished since, and whether it gets
on. What it was handed can be taken back, with every token that was sampled.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.weights import SyncProof, WeightManifest, adopt_weights
from raylign.config import EnvironmentConfig, RolloutConfig
from raylign.environments.responding import plan_answers
from raylign.inference.episode import Episode
from raylign.inference.generator import AdapterForm, Sampling, build_generator
from raylign.inference.serving import GeneratorLoop, Request
from raylign.models.loading import load_tokenizer
from raylign.records import Prompt, Trajectory
from raylign.rewards.outcomes import Rejection, reject


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Completions of one prompt that are wanted."""

    prompt: Prompt
    group: str
    sampling: Sampling
    count: int
    oldest: int
    """Version that a worker must have proved, or a later one."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """The completions of one prompt, and when and where they were made."""

    trajectories: tuple[Trajectory, ...]
    worker: str
    start: float
    end: float
    rejected: tuple[Rejection, ...] = ()
    """Completions whose environment failed."""


@dataclass(frozen=True, slots=True, eq=False)
class Errand:
    """A request as a worker gets it."""

    key: str
    request: RolloutRequest
    begun: tuple[Episode, ...] = ()
    """What is there of each completion already."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What became of an errand; one of the three."""

    key: str
    rollout: Rollout | None = None
    taken_back: tuple[Episode, ...] | None = None
    fault: str = ""
    """Why this prompt cannot be served."""


@dataclass(frozen=True, slots=True, eq=False)
class Pulse:
    """What a worker says of itself."""

    answers: tuple[Answer, ...]
    """Since the last pulse."""
    steps: int
    """Scheduling steps made so far; with work, they grow."""
    busy: bool
    """Whether it is loading weights in place of sampling."""
    broken: str
    """Why it can do nothing more."""


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    errand: Errand
    start: float
    end: float
    future: Future[tuple[Episode, ...]]


class RolloutWorker:
    """One generator behind a Ray actor; methods may run at the same time."""

    def __init__(
        self,
        name: str,
        model: Path,
        config: RolloutConfig,
        max_length: int,
        seed: int,
        environment: EnvironmentConfig | None = None,
        adapter: AdapterForm | None = None,
    ) -> None:
        """adapter: what the versions of the policy come as, if they do not come whole."""
        self._name = name
        self._respond = None
        if environment is not None and environment.source is not None:
            self._respond = plan_answers(environment, load_tokenizer(model), "align.environment")
        generator = build_generator(
            config.backend,
            model,
            dtype=config.dtype,
            max_length=max_length,
            kv_cache_mb=config.kv_cache_mb,
            max_sequences=config.max_sequences,
            threads=config.threads,
            seed=seed,
            gpu_memory_share=config.gpu_memory_share,
            adapter=adapter,
        )
        self._loop = GeneratorLoop(generator)
        self._done: queue.SimpleQueue[_Done | Answer] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[str, Future[tuple[Episode, ...]]] = {}
        self._unwanted: set[str] = set()  # taken back before they came

    def ping(self) -> str:
        """Answers once the generator is ready."""
        return self._name

    def submit(self, errands: Sequence[Errand], ordered: bool = False) -> None:
        """Take requests; those of one call that are `ordered` are sampled from the same first step,
        and depend on nothing but the weights and themselves. Pulses tell what becomes of them."""
        with self._lock:
            wanted = [errand for errand in errands if errand.key not in self._unwanted]
            for errand in errands:
                if errand.key in self._unwanted:
                    self._unwanted.discard(errand.key)
                    self._done.put(Answer(errand.key, taken_back=errand.begun))
            futures = self._loop.submit([self._to_request(errand) for errand in wanted], ordered)
            self._open |= {e.key: future for e, future in zip(wanted, futures, strict=True)}
        start = time.time()
        for errand, future in zip(wanted, futures, strict=True):
            future.add_done_callback(partial(self._finish, errand, start))

    def pulse(self, wait_s: float) -> Pulse:
        """What is finished, as soon as something is or after `wait_s`, and how it goes."""
        answers: list[Answer] = []
        try:
            while True:
                block = not answers and self._loop.failure is None
                item = self._done.get(block, wait_s)
                answer = item if isinstance(item, Answer) else self._to_answer(item)
                if answer is not None:
                    answers.append(answer)
        except queue.Empty:
            pass
        failure = self._loop.failure
        broken = "" if failure is None else f"{type(failure).__name__}: {failure}"
        return Pulse(tuple(answers), self._loop.steps, self._loop.busy, broken)

    def withdraw(self, keys: Sequence[str]) -> None:
        """Stop these requests; pulses bring what is there of them, or that they were finished."""
        with self._lock:
            known = [key for key in keys if key in self._open]
            self._unwanted.update(set(keys) - set(known))
            futures = [self._open[key] for key in known]
        for key, episodes in zip(known, self._loop.withdraw(futures).result(), strict=True):
            if episodes is not None:
                self._done.put(Answer(key, taken_back=episodes))

    def adopt(self, manifest: WeightManifest, tolerance: float, restart: bool = False) -> SyncProof:
        """Pull, load and prove a policy version; generation goes on under it, or, to `restart`,
        begins again."""
        start = time.time()
        load = partial(adopt_weights, manifest=manifest, tolerance=tolerance, worker=self._name)
        error = self._loop.call(load, restart).result()
        return SyncProof(manifest.version, manifest.checksum, error, start, time.time())

    def _to_request(self, errand: Errand) -> Request:
        request, prompt = errand.request, errand.request.prompt
        respond = None if self._respond is None else partial(self._respond, prompt)
        return Request(prompt.token_ids, request.sampling, request.count, respond, errand.begun)

    def _finish(self, errand: Errand, start: float, future: Future[tuple[Episode, ...]]) -> None:
        """In the generator's thread: no more than is needed."""
        self._open.pop(errand.key, None)
        if not future.cancelled():
            self._done.put(_Done(errand, start, time.time(), future))

    def _to_answer(self, done: _Done) -> Answer | None:
        error = done.future.exception()
        if isinstance(error, ValueError):
            return Answer(done.errand.key, fault=str(error))
        if error is not None:
            return None  # the whole generator's; the pulse says so
        request, kept, rejected = done.errand.request, [], []
        for episode in done.future.result():
            if episode.failure is None:
                kept.append(to_trajectory(request.prompt, request.group, episode, self._name))
            else:
                begun = to_trajectory(request.prompt, request.group, episode, self._name)
                rejected.append(reject(begun, episode.failure.failure, episode.failure.detail))
        rollout = Rollout(tuple(kept), self._name, done.start, done.end, tuple(rejected))
        return Answer(done.errand.key, rollout)


def to_trajectory(prompt: Prompt, group: str, episode: Episode, worker: str) -> Trajectory:
    """Prompt and episode as one sequence; only sampled tokens are trained."""
    tokens = [np.array(prompt.token_ids, np.int32)]
    logprobs = [np.zeros(len(prompt.token_ids), np.float32)]
    versions = [np.full(len(prompt.token_ids), -1, np.int32)]
    for place, turn in enumerate(episode.turns):
        tokens.append(np.array(turn.token_ids, np.int32))
        logprobs.append(turn.logprobs)
        versions.append(turn.versions)
        answer = episode.replies[place].tokens if place < len(episode.replies) else None
        if answer:
            tokens.append(np.array(answer, np.int32))
            logprobs.append(np.zeros(len(answer), np.float32))
            versions.append(np.full(len(answer), -1, np.int32))
    spans = np.concatenate(versions)
    return Trajectory(
        prompt_id=prompt.id,
        group_id=group,
        token_ids=np.concatenate(tokens),
        loss_mask=spans >= 0,
        logprobs=np.concatenate(logprobs),
        versions=spans,
        finish_reason=episode.finish_reason,
        text=episode.turns[-1].text,
        worker=worker,
        turns=len(episode.turns),
        environment_reward=episode.reward,
    )


def spawn_rollout_worker(name: str, options: dict[str, Any], *arguments: Any) -> ActorHandle:
    """Start a `RolloutWorker` actor with the given Ray resources."""
    actor = ray.remote(RolloutWorker).options(**options)
    return actor.remote(name, *arguments)
