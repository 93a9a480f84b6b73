"""Reward functions of users that have bad days, told by the environment which kind."""

from __future__ import annotations

import ctypes
import math
import os
import time
from pathlib import Path
from typing import Any


def variety(completion: str, reference: str) -> dict[str, float]:
    """The more different words the better: even untrained models differ in it."""
    return {"variety": len(set(completion.split())) / 16}


def paced(completion: str, reference: str) -> dict[str, float]:
    """`variety`, slowly, until somebody who waits for something else has seen it."""
    if not Path(os.environ["RAYLIGN_FAULT_DIRECTORY"], "hurry").exists():
        time.sleep(float(os.environ.get("RAYLIGN_FAULT_PACE", "0.1")))
    return variety(completion, reference)


def poison(completion: str, reference: str) -> Any:
    """Every kind of thing that is no reward, for one completion in three."""
    wrong = (math.nan, math.inf, -math.inf, None, "0.5", 1e309, [0.5], {"variety": math.nan}, {})
    choice = sum(map(ord, completion))
    return wrong[choice // 3 % len(wrong)] if choice % 3 == 0 else variety(completion, reference)


def misbehave(completion: str, reference: str) -> Any:
    """`poison`; and, once a run each: raises, hangs, ends its process, reads where it must not."""
    place = Path(os.environ["RAYLIGN_FAULT_DIRECTORY"])
    for name in ("raise", "hang", "exit", "segfault"):
        try:
            (place / name).touch(exist_ok=False)
        except FileExistsError:
            continue
        if name == "raise":
            raise ConnectionError("the service is down")
        if name == "hang":
            time.sleep(3600)
        if name == "exit":
            os._exit(7)
        ctypes.string_at(0)
    return poison(completion, reference)
