"""Groups of ranks that train a tiny model in parallel: `parallel_rank.py DIR [CASE ...]`.

A script, because ranks are processes. What is imported is imported once, and every rank is a fork.
Every rank writes what its cases found to DIR.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import raylign.training.deepspeed_engine  # noqa: F401 - before the fork
from raylign.config import AdapterConfig, EngineConfig, ModelConfig, OptimizerConfig
from raylign.config.training import PeftKind
from raylign.models.adapters import adapt
from raylign.models.crossentropy import score_targets
from raylign.models.enclosure import Enclosure
from raylign.models.heads import configure_scorer, score_states
from raylign.models.loading import initialise
from raylign.models.logprobs import score_tokens
from raylign.models.presets import build_config
from raylign.training.engine import DivergenceError, Engine, build_engine
from raylign.training.fragments import StoredState, write_part
from raylign.training.objectives import LanguageObjective
from raylign.training.rows import TextRows, deal
from raylign.training.sums import Sums, tally

WORLDS = (2, 4)
VOCABULARY, ROWS, LENGTH, STEPS = 64, 6, 19, 20
SHAPE = ModelConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, context=32)
UNTIED = SHAPE.model_copy(update={"tie_embeddings": False})
GPTJ = ModelConfig(
    family="gptj",
    hidden_size=32,
    layers=2,
    heads=4,
    ffn_size=48,
    context=32,
    rotary_dim=4,
    tie_embeddings=False,
)
OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5)
OBJECTIVE = LanguageObjective(Path(), "corpus", noise=2.0)


@dataclass(frozen=True)
class Case:
    """A way of taking the same steps."""

    engine: EngineConfig
    micro_batch: int = 3
    shape: ModelConfig = SHAPE
    peft: PeftKind = "none"
    scores: bool = False
    """The head gives scores, as that of a reward model."""
    steps: int = STEPS
    then: tuple[EngineConfig, ...] = ()
    """Engines that go on, each from what the one before has stored, and take as many steps."""
    poisoned: bool = False
    """After the steps, one rank's loss is not a number."""


def case(**keys: Any) -> Case:
    own = {key: keys.pop(key) for key in tuple(keys) if key in Case.__dataclass_fields__}
    return Case(EngineConfig(**keys), **own)


def list_cases(world: int) -> dict[str, Case]:
    """What a group of `world` ranks runs, by name."""
    if world == 1:
        return {
            "whole": case(backend="torch", micro_batch=ROWS),
            "untied": case(backend="torch", micro_batch=ROWS, shape=UNTIED),
            "gptj": case(backend="torch", micro_batch=ROWS, shape=GPTJ),
            "lora": case(backend="torch", micro_batch=ROWS, peft="lora"),
            "prompt": case(backend="torch", micro_batch=ROWS, peft="prompt"),
            "scorer": case(backend="torch", micro_batch=ROWS, scores=True),
            "start": case(backend="torch", steps=0),
        }
    if world == 4:
        offloaded = {"offload": "all", "activation_checkpointing": True}
        return {
            "data-tensor-zero1": case(zero_stage=1, tensor_parallel=2),
            "data-sequence-zero1": case(zero_stage=1, sequence_parallel=2),
            "data-sequence-zero3": case(zero_stage=3, sequence_parallel=2, **offloaded),
            "tensor-sequence-zero2": case(zero_stage=2, tensor_parallel=2, sequence_parallel=2),
            "sequence4-zero0": case(zero_stage=0, sequence_parallel=4),
        }
    again = {"activation_checkpointing": True}
    cases = {
        **{f"zero{stage}": case(zero_stage=stage, micro_batch=2) for stage in range(4)},
        "zero1-offload": case(zero_stage=1, offload="optimizer"),
        "zero2-offload": case(zero_stage=2, offload="optimizer", **again),
        "zero3-offload": case(zero_stage=3, offload="optimizer"),
        "zero3-offload-all": case(zero_stage=3, offload="all", **again),
        "tensor-zero0": case(zero_stage=0, tensor_parallel=2),
        "tensor-zero1": case(zero_stage=1, tensor_parallel=2, **again),
        "tensor-zero2-untied": case(
            zero_stage=2, tensor_parallel=2, offload="optimizer", shape=UNTIED
        ),
        "tensor-zero1-gptj": case(zero_stage=1, tensor_parallel=2, shape=GPTJ),
        "sequence-zero0": case(zero_stage=0, sequence_parallel=2),
        "sequence-zero1": case(zero_stage=1, sequence_parallel=2, **again),
        "sequence-zero3": case(zero_stage=3, sequence_parallel=2),
        "tensor-zero1-scorer": case(zero_stage=1, tensor_parallel=2, scores=True),
        "sequence-zero2-scorer": case(zero_stage=2, sequence_parallel=2, scores=True),
        "sequence-zero1-lora": case(zero_stage=1, sequence_parallel=2, peft="lora"),
        "sequence-zero3-prompt": case(zero_stage=3, sequence_parallel=2, peft="prompt"),
    }
    cases["tensor-then-others"] = case(
        zero_stage=1,
        tensor_parallel=2,
        steps=5,
        then=(
            EngineConfig(zero_stage=3, sequence_parallel=2),
            EngineConfig(zero_stage=0, tensor_parallel=2),
            EngineConfig(zero_stage=2, offload="optimizer"),
        ),
    )
    # Several micro-batches, whose gradients are summed.
    rough = {"dtype": "bfloat16", "steps": 4, "poisoned": True, "micro_batch": 1}
    cases |= {f"zero{stage}-bfloat16": case(zero_stage=stage, **rough) for stage in range(4)}
    cases |= {
        "torch-bfloat16": case(backend="torch", **rough),
        "zero1-offload-bfloat16": case(zero_stage=1, offload="optimizer", **rough),
        "tensor-zero0-bfloat16": case(zero_stage=0, tensor_parallel=2, **rough),
        "tensor-zero1-bfloat16": case(zero_stage=1, tensor_parallel=2, **rough),
        "sequence-bfloat16": case(zero_stage=1, sequence_parallel=2, **rough),
    }
    poison = {"poisoned": True, "steps": 1}
    cases |= {f"zero{stage}-poisoned": case(zero_stage=stage, **poison) for stage in range(4)}
    cases |= {
        "torch-poisoned": case(backend="torch", **poison),
        "zero3-offload-poisoned": case(zero_stage=3, offload="all", **poison),
        "tensor-zero0-poisoned": case(zero_stage=0, tensor_parallel=2, **poison),
        "tensor-zero2-poisoned": case(zero_stage=2, tensor_parallel=2, **poison),
    }
    return cases


def draw_rows(step: int) -> TextRows:
    """Rows of up to three documents, one with padding on the right; of an odd length."""
    stream = np.random.default_rng(step)
    tokens = stream.integers(0, VOCABULARY, (ROWS, LENGTH))
    segments = np.ones((ROWS, LENGTH), np.int64)
    for row in segments:
        first, second = np.sort(stream.integers(1, LENGTH, 2))
        row[first:], row[second:] = 2, 3
    segments[0], segments[1, LENGTH - 4 :] = 1, 0
    trained = (stream.random((ROWS, LENGTH)) < 0.7) & (segments > 0)
    trained[:, 0] = False
    trained[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return TextRows(tokens, segments, trained)


def build(given: Case, seed: int = 7) -> Engine:
    model = assemble(given, seed)
    if given.engine.zero_stage < 3:
        return build_engine(given.engine, model, OPTIMIZER)
    # A model that no device has room for: DeepSpeed would move it, weights that are not shared out.
    with patch.object(Enclosure, "to", side_effect=AssertionError("all of it is on one device")):
        return build_engine(given.engine, model, OPTIMIZER)


def assemble(given: Case, seed: int = 7) -> PreTrainedModel:
    config = build_config(given.shape, VOCABULARY, pad_id=0, eos_id=1)
    model: PreTrainedModel = initialise(config, seed)
    if given.scores:
        scorer = AutoModelForSequenceClassification.from_config(
            configure_scorer(config, "score", 0)
        )
        torch.nn.init.constant_(scorer.score.weight, 0.1)
        scorer.model.load_state_dict(model.model.state_dict())
        model = scorer
    if given.peft != "none":
        adapter = AdapterConfig(rank=4) if given.peft == "lora" else AdapterConfig(virtual_tokens=3)
        model = adapt(model, given.peft, adapter, seed=3, base="base")
    return model


def take_step(
    engine: Engine, micro_batch: int, step: int, factor: float = 1.0
) -> tuple[float, float, float]:
    """Mean loss of the step over all ranks, the norm of its gradient, and a random number as a
    layer would draw it. `factor` is of this rank's loss."""
    torch.manual_seed(step * engine.data_ranks + engine.data_rank)
    rows = draw_rows(step)
    totals = OBJECTIVE.count(rows)
    parts = deal(ROWS, engine.data_rank, engine.data_ranks, micro_batch)
    batches = [OBJECTIVE.assemble(rows, part, step) for part in parts]

    drawn: list[float] = []

    def lose(lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Sums]:
        drawn.append(float(torch.rand(())))
        if lm.get_output_embeddings() is None:
            total = lose_scores(lm, hidden, batch)
            sums = {"loss": tally(total, batch.trained.sum())}
            return total / ROWS * factor, sums
        loss, sums = OBJECTIVE.loss(lm, hidden, batch, totals)
        more = lose_more(lm, hidden, batch) / totals["tokens"]
        return (loss + more) * factor, sums

    total, count = engine.sum(engine.accumulate(batches, lose)["loss"]).tolist()
    assert count == totals["tokens"]
    norm = engine.step(OPTIMIZER.lr * (step + 1) / STEPS)
    return total / count, norm, drawn[0]


def lose_scores(lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    """What reward models do: a score of every row, here pushed up or down by its first token."""
    signs = batch.tokens[:, 0] % 2 * 2.0 - 1
    return torch.nn.functional.softplus(signs * score_states(lm, hidden[:, 1])).sum()


def lose_more(lm: PreTrainedModel, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    """What other objectives do: positions that weigh differently, and states read as they are."""
    chosen = batch.trained[:, 1:]
    states, targets = hidden[:, :-1][chosen], batch.tokens[:, 1:][chosen]
    logprobs, entropies = score_targets(lm, states, targets, temperature=0.8, piece=20)
    return (logprobs.exp() - 0.1 * entropies).sum() + hidden[:, 0].tanh().sum() / hidden.shape[2]


def copy_weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: t.float().clone() for name, t in engine.weights(everywhere=True).items()}


def run_case(given: Case) -> dict[str, Any]:
    """Losses, gradient norms, final weights, and what they say of some rows."""
    engine, steps = build(given), []
    rounding = measure_rounding(engine, given)
    for turn, config in enumerate((given.engine, *given.then)):
        if turn:
            stored = store(engine)
            engine = build(replace(given, engine=config), seed=8)
            engine.restore(stored)
        first = turn * given.steps
        steps += [take_step(engine, given.micro_batch, first + i) for i in range(given.steps)]
    found: dict[str, Any] = dict(
        zip(("losses", "norms", "drawn"), zip(*steps, strict=True), strict=False)
    )
    found |= {"rounding": rounding, "released": list_released(engine)}
    found["held"] = sum(p.numel() for p in engine.lm.parameters())
    found["weights"] = copy_weights(engine)
    found["given"] = {name: t.float().clone() for name, t in engine.weights().items()}
    found["trained"] = {name: t.float().clone() for name, t in engine.exportable().items()}
    found["config"] = engine.lm.config.to_dict(), engine.lm.config._attn_implementation
    found["buffers"] = {b.dtype for b in engine.lm.buffers() if b.is_floating_point()}
    if given.poisoned:
        last = engine.rank == engine.world_size - 1
        found["kept"] = read_memory(engine)
        try:
            take_step(engine, given.micro_batch, 50, factor=float("nan") if last else 1.0)
        except DivergenceError as error:
            found["error"] = str(error)
        found["left"] = read_memory(engine)
        return found
    if given.scores:
        return found
    with torch.no_grad():
        tokens = torch.from_numpy(draw_rows(99).tokens)
        found["logprobs"] = score_tokens(engine.module, tokens, piece=20)[0]
    return found


def measure_rounding(engine: Engine, given: Case) -> float:
    """The largest difference between this rank's masters and the float32 weights of the model that
    the engine was given."""
    exact, largest = dict(assemble(given).named_parameters()), 0.0
    for part in engine.fragments():
        whole = part.place.cut(exact[part.name].detach()).reshape(-1)
        gap = part.tensors["master"] - whole.narrow(0, part.start, part.numel)
        largest = max(largest, float(gap.abs().max()))
    return largest


def list_released(engine: Engine) -> list[str]:
    """Weights of which a rank holds a part while they are not in use."""
    return [name for name, p in engine.lm.named_parameters() if not getattr(p, "ds_persist", True)]


def store(engine: Engine) -> StoredState:
    """Every rank's part of the state, on disk."""
    paths: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(paths)
    write_part(engine.fragments(), Path(paths[0]) / f"{engine.rank}.safetensors")
    dist.barrier()
    return StoredState(Path(paths[0]))


def read_memory(engine: Engine) -> dict[str, torch.Tensor]:
    """All that a step would change: weights, their float32 masters, the optimizer's moments."""
    found = copy_weights(engine)
    for fragment in engine.fragments():
        for kind, tensor in fragment.tensors.items():
            found[f"{fragment.name}.{fragment.start}.{kind}"] = tensor.clone()
    return found


def run_rank(directory: Path, rank: int, world: int, port: int, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = str(directory)
    faulthandler.dump_traceback_later(240, exit=True)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
    found = {
        name: run_case(given)
        for name, given in list_cases(world).items()
        if not chosen or name in chosen
    }
    torch.save(found, directory / f"found-{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def main(directory: Path, chosen: list[str]) -> int:
    """The number of ranks that failed."""
    context = multiprocessing.get_context("fork")
    processes = []
    for world in WORLDS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            arguments = (directory, rank, world, port, chosen)
            processes.append(context.Process(target=run_rank, args=arguments))
    gc.freeze()  # DeepSpeed collects garbage at every turn: not what was imported
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    gc.unfreeze()
    return sum(process.exitcode != 0 for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
