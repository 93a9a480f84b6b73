"""Which run a checkpoint belongs to: what may change in between, and what may not."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_loop import VOCABULARY, make_task, shards  # noqa: F401

from raylign.algorithms.preference import Numbers
from raylign.config import CheckpointConfig, EngineConfig, ModelConfig, OptimizerConfig, UserError
from raylign.models.assembly import ModelPlan
from raylign.models.loading import load_model, load_tokenizer, save_model
from raylign.models.presets import build_config
from raylign.tracking import EVENTS_FILE, read_lines
from raylign.training.checkpoints import list_checkpoints
from raylign.training.comparisons import PreferenceObjective
from raylign.training.continuation import describe_value
from raylign.training.loop import CHECKPOINTS, SupervisedLoop
from raylign.training.references import Reference


def test_a_checkpoint_of_something_else_is_refused(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    task = replace(make_task(shards, tiny_model, tmp_path / "out"), prompts=(), checkpoint_every=4)
    task = replace(task, steps=6)
    SupervisedLoop(task).run()
    other_tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_model, other_tokenizer)
    (other_tokenizer / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    wider = build_config(
        ModelConfig(hidden_size=32, layers=1, ffn_size=24, context=32),
        VOCABULARY,
        pad_id=0,
        eos_id=1,
    )
    changes: dict[str, dict[str, Any]] = {
        "model": {"model": ModelPlan(wider, seed=1)},
        "tokenizer": {"tokenizer": other_tokenizer},
        "seed": {"seed": 3},
        "batch size": {"batch_size": 5},
        "steps": {"steps": 7},
        "task": {"optimizer": OptimizerConfig(lr=2e-2)},
    }
    for what, change in changes.items():
        with pytest.raises(UserError) as caught:
            SupervisedLoop(replace(task, **change)).run()
        assert f"step-00000004 is a checkpoint of another {what} (" in str(caught.value)
        assert "set pretrain.checkpoints.resume=never" in str(caught.value)
    # What only says where and how it is computed, and what is shown of it, may change.
    SupervisedLoop(
        replace(
            task,
            micro_batch_size=3,
            threads=2,
            checkpoint_every=3,
            prompts=(("w3", (6,)),),
            sample_tokens=3,
            engine=EngineConfig(timeout_s=7.0, zero_stage=0),
            checkpoints=CheckpointConfig(keep=5, asynchronous=False, after="all"),
        )
    ).run()


def test_a_run_goes_on_where_it_has_been_moved_to(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    task = replace(make_task(shards, tiny_model, tmp_path / "out"), prompts=(), steps=9)
    SupervisedLoop(task).run()
    for what, source in (("out", task.output), ("shards", shards), ("tokenizer", tiny_model)):
        shutil.copytree(source, tmp_path / "there" / what)
    there = tmp_path / "there"
    objective = replace(task.objective, directory=there / "shards")  # type: ignore[type-var]
    SupervisedLoop(
        replace(task, output=there / "out", tokenizer=there / "tokenizer", objective=objective)
    ).run()
    started = [e for e in read_lines(there / "out" / EVENTS_FILE) if e["what"] == "started"]
    assert [event["step"] for event in started] == [0, 8]
    with pytest.raises(UserError, match="of another task"):
        changed = replace(objective, isolate=False)
        SupervisedLoop(replace(task, objective=changed)).run()


def test_an_adapter_goes_on_with_its_own_base_only(
    shards: Path,  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Checkpoints of adapters hold no base: another one of the same shape would be used unseen."""
    bases = {}
    for name, change in (("moved", 0.0), ("other", 1e-2)):
        lm = load_model(tiny_model)
        with torch.no_grad():
            lm.model.layers[1].mlp.up_proj.weight.mul_(1 + change)
        bases[name] = tmp_path / name
        save_model(lm, lm.config, load_tokenizer(tiny_model), bases[name])
    plan = ModelPlan(tiny_model, 1, peft="qlora")
    task = make_task(shards, tiny_model, tmp_path / "out")
    task = replace(task, model=plan, prompts=(), steps=9)
    SupervisedLoop(task).run()
    other = replace(task, model=replace(plan, start=bases["other"]))
    with pytest.raises(UserError, match="is a checkpoint of another base model"):
        SupervisedLoop(other).run()
    adopting = CheckpointConfig(adopt=list_checkpoints(task.output / CHECKPOINTS)[-1])
    with pytest.raises(UserError, match="is a checkpoint of another base model"):
        SupervisedLoop(replace(other, output=tmp_path / "new", checkpoints=adopting)).run()
    # In another type the base is the same.
    bfloat16 = EngineConfig(backend="torch", dtype="bfloat16")
    moved = replace(plan, start=bases["moved"], dtype="bfloat16")
    SupervisedLoop(replace(task, model=moved, engine=bfloat16)).run()
    started = [e for e in read_lines(task.output / EVENTS_FILE) if e["what"] == "started"]
    assert [event["step"] for event in started] == [0, 8]


def test_scores_of_a_reference_may_be_computed_elsewhere_and_in_other_batches() -> None:
    def describe(**changes: Any) -> Any:
        reference = Reference(Path("/a/run/.reference/0123"), None, 8)
        reference = replace(reference, **changes)
        return describe_value(
            PreferenceObjective(Path("/a/rows"), "dpo", Numbers(), 0, 0.0, reference)
        )

    known = describe()
    assert describe(batch=2) == known == describe(cache=Path("/b/.reference/0123"))
    assert describe(cache=Path("/a/run/.reference/4567")) != known
    assert describe(policy=Path("/a/policy")) == describe(policy=Path("/b/policy")) != known
