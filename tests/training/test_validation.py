"""Held-out rows are measured alike, however they are grouped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from test_comparisons import draw_pairs

from raylign.algorithms.preference import Numbers
from raylign.config import EngineConfig, OptimizerConfig
from raylign.models.loading import load_model
from raylign.training.compared_rows import write_compared
from raylign.training.comparisons import PreferenceObjective
from raylign.training.engine import build_engine
from raylign.training.validation import Validation


def test_validation_is_the_same_however_many_micro_batches_are_measured_at_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    """With a loss whose denominators differ from micro-batch to micro-batch."""
    for split, count in (("train", 7), ("validation", 23)):
        write_compared(draw_pairs(count, count), tmp_path, split)
    objective = PreferenceObjective(tmp_path, "orpo", Numbers(), 0)
    engine = build_engine(EngineConfig(backend="torch"), load_model(tiny_model), OptimizerConfig())
    beats: list[int] = []
    found = [
        Validation(engine, objective, 2, stages, lambda: beats.append(1)).measure()
        for stages in (1, 2)
    ]
    assert found[0] == found[1] and found[0]["loss"] > 0 and engine.module.training
    assert len(beats) >= 2 * 12
