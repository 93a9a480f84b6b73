"""Where a rank begins: light, because Ray Train's controller reads this too, and needs no model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any


def start_rank(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train as the pickled `task` in `config` says; returns what `train_rank` does."""
    from raylign.training.supervised import train_rank

    return train_rank(pickle.loads(config["task"]))
