"""What an interrupted training stage, or search, must share with the attempt before to go on after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from actors.run_files import BATCHES
from jobs.entry import perform
from raylign.config import (
    AlignConfig,
    EngineConfig,
    RolloutConfig,
    TrainingConfig,
    TransferConfig,
    TuneConfig,
)
from raylign.run import Draft, Keeping, Run, Stage
from raylign.tracking import METRICS_FILE, ProgressBoard
from raylign.training.loop import CHECKPOINTS

# Keys that do not decide what is learnt, for the reason given. They may change while a stage is
# unfinished, and hold from then on. All others, new ones included, must stay.
SEARCH_FREE: dict[str, Any] = {
    # The same rows and denominators whoever computes them: any number of ranks, any engine. Its
    # dtype is that of the weights.
    "workers": True,
    "micro_batch_size": True,
    "engine": set(EngineConfig.model_fields) - {"dtype"},
    # What is saved, and how. Not `adopt`: training begins with it.
    "checkpoints": {"keep", "asynchronous", "after", "resume"},
}
# Of one stage also what is looked at on the way; of a search, trials are compared by it.
FREE: dict[str, Any] = SEARCH_FREE | {
    "checkpoint_every": True,
    "sample_prompts": True,
    "sample_tokens": True,
    "sample_temperature": True,
}
# Of reinforcement learning: who does the work, and what is looked at. Ranks and workers sum and
# batch otherwise, so the last bits may differ from then on.
ALIGN_FREE: dict[str, Any] = {
    "rollout": set(RolloutConfig.model_fields) - {"backend", "dtype"},
    "learner": True,
    "engine": set(EngineConfig.model_fields) - {"dtype"},
    "scaling": True,
    "transfer": set(TransferConfig.model_fields) - {"adapter_only"},
    "reward": {"count", "cpus", "gpus", "threads", "timeout_s", "attempts", "max_restarts"},
    "judge": {"rollout", "most", "scale_queue", "timeout_s", "attempts", "concurrency", "key_file"}
    | {"endpoint", "max_calls", "cache"},
    "checkpoints": {"keep", "asynchronous", "after", "resume"},
    **dict.fromkeys(("guard", "sinks", "examples_every", "checkpoint_every"), True),
    "mismatch_sample": True,
}
RESOURCES = {"concurrent", "cpus", "gpus"}
"""Of `tune`: what a search does not depend on."""
TRIALS = ".trials"


def perform_training(
    run: Run,
    name: str,
    config: TrainingConfig,
    seed: int,
    parents: Mapping[str, str],
    board: ProgressBoard,
    build: Callable[[Draft], None],
) -> Stage:
    """`perform` for a training stage: an interrupted one goes on from its checkpoints, which are
    never removed unasked."""
    settings = {name: config.model_dump(mode="json"), "seed": seed}
    keeping = Keeping(
        {name: config.model_dump(mode="json", exclude=FREE), "seed": seed},
        (f"{CHECKPOINTS}/step-*",),
        "checkpoints",
        f"redo={name} or {name}.checkpoints.resume=never",
    )
    resume = config.checkpoints.resume == "auto"
    return perform(run, name, settings, parents, board, build, resume, keeping)


def perform_alignment(
    run: Run,
    config: AlignConfig,
    seed: int,
    parents: Mapping[str, str],
    board: ProgressBoard,
    build: Callable[[Draft], None],
) -> Stage:
    """`perform` for reinforcement learning: an interrupted run goes on from its checkpoints, and
    from the batches after them, which are never removed unasked."""
    keeping = Keeping(
        {"align": config.model_dump(mode="json", exclude=ALIGN_FREE), "seed": seed},
        (f"{CHECKPOINTS}/step-*", f"{BATCHES}/step-*"),
        "checkpoints and batches",
        "redo=align or align.checkpoints.resume=never",
    )
    settings = {"align": config.model_dump(mode="json"), "seed": seed}
    resume = config.checkpoints.resume == "auto"
    return perform(run, "align", settings, parents, board, build, resume, keeping)


def perform_search(
    run: Run,
    config: TuneConfig,
    stage: AlignConfig | TrainingConfig,
    seed: int,
    parents: Mapping[str, str],
    board: ProgressBoard,
    build: Callable[[Draft], None],
) -> Stage:
    """`perform` for a search over `stage`: an interrupted one goes on with its trials, which are
    never removed unasked."""

    def describe(free: Mapping[str, Any], resources: set[str]) -> dict[str, Any]:
        return {
            "tune": config.model_dump(mode="json", exclude=resources),
            config.stage: stage.model_dump(mode="json", exclude=dict(free)),
            "seed": seed,
        }

    finished, begun = f"{config.stage}/{METRICS_FILE}", f".{config.stage}.partial/{METRICS_FILE}"
    keeping = Keeping(
        describe(ALIGN_FREE if config.stage == "align" else SEARCH_FREE, RESOURCES),
        # At the top of a trial's directory, or of that of its last copy.
        tuple(f"{TRIALS}/*/{below}{file}" for below in ("", "*/") for file in (finished, begun)),
        "trials",
        "redo=tune",
    )
    settings = describe({}, set())
    return perform(run, "tune", settings, parents, board, build, resume=True, keeping=keeping)
