"""Weights that ZeRO-3 has shared out, whole for a moment."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
from torch import nn


def gather_partitioned(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, the parameters are whole on every rank. Collective."""
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters))
    return gathered
