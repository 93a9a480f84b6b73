"""What a reference policy says is computed once, and what it depends on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_comparisons import ENGINE, draw_pairs, make, pairs, score_alone  # noqa: F401

from raylign.algorithms.preference import Numbers
from raylign.config import OptimizerConfig
from raylign.models.loading import load_model, load_tokenizer, save_model
from raylign.training.compared_rows import ComparedFile, write_compared
from raylign.training.comparisons import PreferenceObjective
from raylign.training.engine import build_engine
from raylign.training.references import Reference


def test_reference_log_probs_are_computed_once(
    tiny_model: Path,
    pairs: Path,  # noqa: F811
) -> None:
    items = draw_pairs(7, 7)
    reference = Reference(pairs / "cache", batch=3)
    objective = PreferenceObjective(pairs, "dpo", Numbers(), 0, reference=reference)
    engine = build_engine(ENGINE, load_model(tiny_model), OptimizerConfig())
    objective.begin(engine, pairs)
    found = objective.open("train").read(range(7)).reference
    with torch.no_grad():
        expected = [[float(score_alone(engine.lm, i, side)) for side in (0, 1)] for i in items]
    assert np.allclose(found, expected, atol=1e-4)
    assert (
        ComparedFile(pairs, "validation", reference.cache / "validation.npy")
        .read([0])
        .reference.any()
    )
    before = (reference.cache / "train.npy").stat().st_mtime_ns
    with torch.no_grad():
        engine.lm.model.norm.weight.mul_(2)
    objective.begin(engine, pairs)
    assert (reference.cache / "train.npy").stat().st_mtime_ns == before
    assert engine.module.training


def test_scoring_is_seen_to_go_on(
    tiny_model: Path,
    pairs: Path,  # noqa: F811
) -> None:
    beats: list[int] = []
    reference = Reference(pairs / "cache", batch=3)
    objective = PreferenceObjective(pairs, "dpo", Numbers(), 0, reference=reference)
    engine = build_engine(ENGINE, load_model(tiny_model), OptimizerConfig())
    objective.begin(engine, pairs, lambda: beats.append(1))
    assert len(beats) == 3 + 1  # micro-batches of 7 rows, and of 3


def test_another_policy_may_be_the_reference(
    tiny_model: Path,
    pairs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    other = load_model(tiny_model)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    save_model(other, other.config, load_tokenizer(tiny_model), tmp_path / "other")
    reference = Reference(pairs / "cache", tmp_path / "other")
    objective = PreferenceObjective(pairs, "dpo", Numbers(), 0, reference=reference)
    objective.begin(build_engine(ENGINE, load_model(tiny_model), OptimizerConfig()), pairs)
    found = objective.open("validation").read(range(3)).reference
    items = draw_pairs(3, 3)
    with torch.no_grad():
        expected = [[float(score_alone(other, i, side)) for side in (0, 1)] for i in items]
    assert np.allclose(found, expected, atol=1e-4)


def test_losses_without_reference_need_none(
    tiny_model: Path,
    pairs: Path,  # noqa: F811
) -> None:
    objective = PreferenceObjective(pairs, "simpo", Numbers(), 0)
    objective.begin(build_engine(ENGINE, load_model(tiny_model), OptimizerConfig()), pairs)
    assert not (pairs / "cache").exists()


def test_what_scores_depend_on_names_them(tmp_path: Path) -> None:
    items = draw_pairs(3)
    name = write_compared(items, tmp_path, "a")
    assert write_compared([replace(i, value=9.0) for i in items], tmp_path, "b") == name
    assert write_compared(items[:2], tmp_path, "c") != name
    assert write_compared([make([5], [6], [7])], tmp_path, "d") != write_compared(
        [make([5, 6], [7], [7])], tmp_path, "e"
    )


def test_rows_are_traced_to_the_users_file(tmp_path: Path) -> None:
    items = [replace(item, row=row) for item, row in zip(draw_pairs(3), (2, 5, 9), strict=True)]
    digest = write_compared(items, tmp_path, "train")
    rows = ComparedFile(tmp_path, "train")
    assert [rows.trace(row) for row in range(3)] == [[2], [5], [9]]
    moved = [replace(item, row=item.row + 1) for item in items]
    assert write_compared(moved, tmp_path, "train") == digest, "scores do not depend on it"
    write_compared(draw_pairs(1), tmp_path, "unknown")
    assert ComparedFile(tmp_path, "unknown").trace(0) == []
