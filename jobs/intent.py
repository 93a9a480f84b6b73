"""What an interrupted training stage, or search, must share with the attempt before to go on after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jobs.entry import perform
from raylign.config import EngineConfig, TrainingConfig
from raylign.run import Draft, Keeping, Run, Stage
from raylign.tracking import ProgressBoard
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
}


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
