"""Evaluation: `python -m jobs.evaluate recipe.yaml [evaluate.key=value ...]`.

Every model is served by its own worker and asked the same lm-eval tasks. Writes the `evaluate`
stage and prints the models side by side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from jobs.entry import locate, main, model_directory, perform, section
from raylign.config import EvaluateConfig, Recipe, UserError
from raylign.evaluation.episodes import evaluate_episodes
from raylign.evaluation.pairing import compare_models
from raylign.evaluation.tasks import EPISODES, LOCAL_TASKS, write_tasks
from raylign.inference.generator import Generator, build_generator
from raylign.models.loading import load_config, load_tokenizer
from raylign.run import Draft, Run, content_hash, write_json
from raylign.runtime import derive_seed, worker_env
from raylign.tracking import ProgressBoard

# What the results do not depend on: changing it leaves a finished evaluation valid.
RESOURCE_KEYS = {"workers", "cpus", "gpus", "threads", "deadline_s"}
OWN_MODELS = {"base": "pretrain", "sft": "sft", "rl": "align"}

Results = dict[str, Any]


def run(recipe: Recipe, run: Run, board: ProgressBoard) -> None:
    """The `evaluate` stage."""
    config = section(recipe, "evaluate", EvaluateConfig)
    models, parents = choose_models(run, config)
    corpus = None
    if set(config.tasks) & set(LOCAL_TASKS):
        corpus, parents["corpus"] = locate(run, None, "corpus", "prepare", "evaluate.tasks")

    def build(draft: Draft) -> None:
        seed = derive_seed(recipe.seed, "evaluate")
        found = evaluate_models(models, corpus, config, seed, board)
        results = compare_models(found)
        write_json(draft.path / "results.json", results)
        draft.summary.update(_summarize(results))
        show(results, board)

    settings = {
        "evaluate": config.model_dump(mode="json", exclude=RESOURCE_KEYS),
        "seed": recipe.seed,
    }
    perform(run, "evaluate", settings, parents, board, build)


def choose_models(run: Run, config: EvaluateConfig) -> tuple[dict[str, Path], dict[str, str]]:
    """Names to model directories and to content hashes: the ones given, or the run's own.

    Raises `UserError` for a missing directory, and for a run without any model.
    """
    models: dict[str, Path] = {}
    parents: dict[str, str] = {}
    for name, path in config.models.items():
        if not path.is_dir():
            raise UserError(f"evaluate.models.{name}={path}: no such directory")
        models[name] = model_directory(path)
        parents[name] = content_hash(path)
    if not config.models:
        for name, stage_name in OWN_MODELS.items():
            stage = run.find(stage_name)
            if stage is not None:
                models[name] = model_directory(stage.path)
                parents[stage_name] = stage.manifest.content
    if not models:
        raise UserError(
            f"run {run.root} has no model to evaluate; run `python -m jobs.pretrain` on this "
            "recipe first, or name directories in evaluate.models"
        )
    return models, parents


def evaluate_models(
    models: Mapping[str, Path],
    corpus: Path | None,
    config: EvaluateConfig,
    seed: int,
    board: ProgressBoard,
) -> dict[str, Results]:
    """What `evaluate_model` finds for every model, `config.workers` of them at a time.

    Raises `UserError` when the cluster is too small, a worker fails for a reason that the user can
    mend, dies, or takes longer than `config.deadline_s`.
    """
    _check_cluster(config)
    waiting = list(models.items())
    running: dict[Any, tuple[str, float]] = {}
    found: dict[str, Results] = {}
    with board.bar("evaluate", len(models), unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < config.workers:
                name, path = waiting.pop(0)
                reference = _remote_evaluate(config).remote(path, corpus, config, seed)
                running[reference] = (name, time.monotonic() + config.deadline_s)
            bar.update(len(found), note=", ".join(name for name, _ in running.values()))
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                name, _ = running.pop(reference)
                found[name] = _collect(name, reference)
            _check_deadlines(running, config)
        bar.update(len(found))
    return {name: found[name] for name in models}


def _remote_evaluate(config: EvaluateConfig) -> Any:
    env = worker_env() | {"OMP_NUM_THREADS": str(config.threads)}
    if not config.gpus:
        # Asking vLLM for logprobs compiles a sampler for many seconds, for no gain on a CPU.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return ray.remote(
        num_cpus=config.cpus,
        num_gpus=config.gpus,
        # An engine leaves threads and memory behind that only the end of its process frees.
        max_calls=1,
        max_retries=1,
        runtime_env={"env_vars": env},
    )(evaluate_directory)


def evaluate_directory(
    model: Path, corpus: Path | None, config: EvaluateConfig, seed: int
) -> Results:
    """Serve one model directory and ask it every task; the body of a worker."""
    context = int(load_config(model).max_position_embeddings)
    max_length = min(config.max_length, context)
    if config.max_tokens >= max_length:
        raise UserError(
            f"evaluate.max_tokens={config.max_tokens} leaves no room for a prompt in the "
            f"{max_length} tokens of {model}; lower it"
        )
    tokenizer = load_tokenizer(model)
    generator = build_generator(
        config.backend,
        model,
        dtype=config.dtype,
        max_length=max_length,
        kv_cache_mb=config.kv_cache_mb,
        max_sequences=config.max_sequences,
        threads=config.threads,
        seed=seed,
    )
    found: Results = {"metrics": {}, "higher_is_better": {}, "documents": {}}
    try:
        if set(config.tasks) != {EPISODES}:
            _merge(found, _ask_tasks(generator, tokenizer, corpus, config, max_length, seed))
        if EPISODES in config.tasks:
            assert corpus is not None  # it is looked for wherever one of its tasks is asked
            own = config.environment
            more = evaluate_episodes(
                generator, tokenizer, corpus, own, config.limit, max_tokens=config.max_tokens
            )
            _merge(found, more)
    finally:
        generator.close()
    return found


def _ask_tasks(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path | None,
    config: EvaluateConfig,
    max_length: int,
    seed: int,
) -> Results:
    """What lm-eval makes of its own tasks and of those that are made from `corpus`."""
    # lm-eval takes seconds to import, and only workers need it.
    from raylign.evaluation.harness import evaluate_model

    names = [name for name in config.tasks if name != EPISODES]
    with tempfile.TemporaryDirectory(prefix="raylign-tasks-") as directory:
        paths = [] if config.task_path is None else [config.task_path]
        if corpus is not None:
            write_tasks(names, corpus, Path(directory), config.max_tokens)
            paths.append(Path(directory))
        return evaluate_model(
            generator,
            tokenizer,
            names,
            paths,
            config.limit,
            chat=config.chat,
            max_length=max_length,
            max_tokens=config.max_tokens,
            seed=seed,
            offline=config.offline,
        )


def _merge(found: Results, more: Mapping[str, Any]) -> None:
    for kind, by_task in found.items():
        by_task.update(more[kind])


def _check_cluster(config: EvaluateConfig) -> None:
    """Ray would wait without end for what the cluster does not have."""
    present = ray.cluster_resources()
    for kind, wanted in (("CPU", config.cpus), ("GPU", config.gpus)):
        if wanted > present.get(kind, 0.0):
            raise UserError(
                f"evaluate.{kind.lower()}s={wanted:g}: the cluster has "
                f"{present.get(kind, 0.0):g} {kind}; lower it"
            )


def _collect(name: str, reference: Any) -> Results:
    """A worker's results; its failure as one line where the user can mend it."""
    try:
        return ray.get(reference)
    except UserError as error:
        # Raised in the worker, it arrives wrapped with the worker's traceback.
        raise UserError(str(getattr(error, "cause", error))) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"evaluate: the worker of model {name!r} died twice ({str(error).splitlines()[0]}); "
            "if memory ran out, lower evaluate.workers or evaluate.kv_cache_mb"
        ) from None


def _check_deadlines(running: Mapping[Any, tuple[str, float]], config: EvaluateConfig) -> None:
    for reference, (name, deadline) in running.items():
        if time.monotonic() > deadline:
            ray.cancel(reference, force=True)
            raise UserError(
                f"evaluate: model {name!r} was not through after {config.deadline_s:g} s; raise "
                "evaluate.deadline_s, or set evaluate.limit"
            )


def show(results: Results, board: ProgressBoard) -> None:
    """The models side by side on the console."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for model in results["models"]:
        table.add_column(model, justify="right")
    for task, found in results["tasks"].items():
        for metric, scores in found["metric"].items():
            row = [_show_score(scores.get(model)) for model in results["models"]]
            table.add_row(f"{task} {metric}", *row)
    board.console.print(table)


def _show_score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    error = "" if score["stderr"] is None else f" [dim]± {score['stderr']:.3f}[/]"
    return f"{score['value']:.3f}{error}"


def _summarize(results: Results) -> dict[str, float]:
    """Every model's value of the first metric of the first task."""
    for task, found in results["tasks"].items():
        for metric, scores in found["metric"].items():
            return {f"{task}/{metric}/{model}": round(s["value"], 4) for model, s in scores.items()}
    return {}


if __name__ == "__main__":
    main("evaluate", run)
