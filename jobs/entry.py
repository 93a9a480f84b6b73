"""What every job does alike: read the recipe, join Ray, run, and end with an honest exit status.

Status 0 is success, 2 a mistake the user can put right (one line on stderr), 130 an interrupt;
anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jobs.head import watch_head
from raylign.config import Recipe, Section, UserError, load_recipe
from raylign.models.hub import identify_model, locate_model
from raylign.run import (
    Draft,
    Keeping,
    Run,
    Stage,
    content_hash,
    describe_difference,
    fingerprint,
    list_contents,
)
from raylign.runtime import configure, connect, disconnect, in_submitted_job, is_full
from raylign.tracking import ProgressBoard

# Every stage a run can hold, in the order of the journey.
STAGES = (
    "synthetic",
    "documents",
    "classifier",
    "signals",
    "signatures",
    "corpus",
    "tokenizer",
    "shards",
    "data_report",
    "pretrain",
    "sft",
    "comparisons",
    "reward_model",
    "preference",
    "tune",
    "merge",
    "align",
    "evaluate",
    "report",
)

T = TypeVar("T", bound=Section)
Job = Callable[[Recipe, Run, ProgressBoard], None]


def main(name: str, job: Job, options: Mapping[str, Callable[..., None]] | None = None) -> NoReturn:
    """Entry point of `python -m jobs.NAME`; an argument among `options` runs that instead.

    An option that is spelt with a value, like `--show COUNT`, gives it to its job first.
    """
    arguments = sys.argv[1:]
    for option, other in (options or {}).items():
        flag, _, value = option.partition(" ")
        if flag in arguments:
            at = arguments.index(flag)
            given = arguments[at + 1 : at + 2] if value else []
            rest = arguments[:at] + arguments[at + 1 + len(given) :]
            # Without its value nothing is left, and the usage is shown.
            arguments, job = (rest, partial(other, *given)) if given or not value else ([], job)
    if not arguments or arguments[0] in ("-h", "--help"):
        more = "".join(f" [{option}]" for option in options or {})
        usage = f"usage: python -m jobs.{name} RECIPE.yaml [section.key=value ...]{more}\n"
        sys.stderr.write(usage)
        raise SystemExit(0 if arguments else 2)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        run = open_run(recipe)
        configure(recipe.ray)
        with ProgressBoard() as board:
            job(recipe, run, board)
    except UserError as error:
        # Raised in a worker, it arrives wrapped with the worker's traceback.
        sys.stderr.write(f"error: {getattr(error, 'cause', error)}\n")
        raise SystemExit(2) from None
    except OSError as error:
        if not is_full(error):
            raise
        place = error.filename or "the run directory"
        sys.stderr.write(f"error: no space left for {place}; free some and run again\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished stages are kept, rerun to continue\n")
        raise SystemExit(130) from None
    finally:
        disconnect()
    raise SystemExit(0)


def open_run(recipe: Recipe) -> Run:
    """The recipe's run directory, without the stage that `redo` names and all made from it."""
    if in_submitted_job() and not recipe.run.is_absolute():
        raise UserError(
            f"run={recipe.run}: a submitted job starts in a temporary copy of the code; "
            "give an absolute path on storage that every node sees"
        )
    run = Run(recipe.run, recipe.redo)
    if recipe.redo is not None:
        if recipe.redo not in STAGES:
            raise UserError(f"redo={recipe.redo}: not a stage; choose from {', '.join(STAGES)}")
        try:
            finished, unfinished = follow(run, recipe.redo)
            # The last first: of those left by a kill, it is still known what they were made from.
            for stage in reversed(finished):
                run.discard(stage)
            for stage in unfinished:
                run.abandon(stage)
        except OSError as error:
            raise UserError(
                f"redo={recipe.redo}: {run.root} cannot be changed ({error.strerror}); make it "
                "writable, or choose another run=..."
            ) from None
    return run


def follow(run: Run, first: str) -> tuple[list[str], list[str]]:
    """Stages that were made from `first`, itself included, and unfinished ones that are being.

    A damaged stage does not say what it was made from: it counts when it comes later, and so do all
    later ones when `first` itself is damaged.
    """
    later = STAGES[STAGES.index(first) :]
    found: dict[str, Stage] = {}
    damaged = []
    for name in STAGES:
        try:
            stage = run.find(name)
        except UserError:
            damaged.append(name)
            continue
        if stage is not None:
            found[name] = stage
    if first in damaged:
        return list(later), []
    doomed = {first, *(name for name in damaged if name in later)}
    lost = list_contents(found[first]) if first in found else set()
    while made := [
        name
        for name, stage in found.items()
        if name not in doomed and not lost.isdisjoint(stage.manifest.parents.values())
    ]:
        for name in made:
            doomed.add(name)
            lost |= list_contents(found[name])
    begun = [name for name in STAGES if not lost.isdisjoint(run.begun_from(name).values())]
    return [name for name in STAGES if name in doomed], begun


def section(recipe: Recipe, name: str, kind: type[T]) -> T:
    """The recipe's section `name`; raises `UserError` when the recipe has none."""
    value = getattr(recipe, name)
    if value is None:
        raise UserError(
            f"the recipe has no {name!r} section; add one (`{name}: {{}}` takes all defaults)"
        )
    assert isinstance(value, kind)
    return value


def locate(run: Run, given: Path | None, stage: str, job: str, key: str) -> tuple[Path, str]:
    """An input's path and content hash: the path the user gave, else the run's own stage."""
    if given is None:
        found = run.require(stage, job)
        return found.path, found.manifest.content
    if not given.exists():
        raise UserError(f"{key}={given}: no such file or directory")
    return given.absolute(), content_hash(given)


def locate_start(run: Run, given: str | None, stage: str, job: str, key: str) -> tuple[Path, str]:
    """A model's directory and content hash: the directory or hub name that the user gave, else the
    run's own stage."""
    if given is None:
        path, content = locate(run, None, stage, job, key)
    else:
        path = locate_model(given, key)
        content = identify_model(path)
    return model_directory(path), content


def locate_tokenizer(run: Run, given: str | None, stage: str, job: str, key: str) -> Path:
    """A model's directory as by `locate_start`, for its tokenizer and configuration: of the hub no
    weights are fetched, and nothing is hashed."""
    if given is None:
        return model_directory(run.require(stage, job).path)
    return model_directory(locate_model(given, key, weights=False))


def model_directory(path: Path) -> Path:
    """Where the weights are: a stage of ours keeps them in `model/`, or in `adapter/` what cannot
    be folded into a model; others at the top."""
    for name in ("model", "adapter"):
        if (path / name).is_dir():
            return path / name
    return path


def perform(
    run: Run,
    name: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    board: ProgressBoard,
    build: Callable[[Draft], None],
    resume: bool = False,
    keeping: Keeping | None = None,
) -> Stage:
    """Build stage `name` on Ray, or find it finished with the same settings and parents.

    With `resume`, a stage that was interrupted continues with what it had finished. Raises
    `UserError` when it is finished with others, or unfinished with what `keeping` does not give up:
    nothing is overwritten unasked.
    """
    done = run.find(name)
    if done is not None:
        if done.manifest.fingerprint == fingerprint(settings, parents):
            run.tidy(name)
            board.say(f"[green]✓[/] {name}: already done ({done.path})")
            return done
        old = {"settings": done.manifest.settings, "parents": done.manifest.parents}
        difference = describe_difference(old, {"settings": settings, "parents": parents})
        raise UserError(
            f"stage {name!r} in {run.root} was made with {difference}; choose another run=..., or "
            f"redo={name} to discard it and all that were made from it"
        )
    connect()
    watch_head()
    with run.write(name, settings, parents, resume, keeping) as draft:
        build(draft)
    finished = run.require(name, name)
    board.say(f"[green]✓[/] {name}: done in {finished.manifest.seconds:.0f} s ({finished.path})")
    return finished


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
