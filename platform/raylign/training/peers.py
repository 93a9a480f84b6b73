"""Agreement between ranks on things that take long, in collectives that do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raylign.config import UserError

T = TypeVar("T")
PAUSE_S = 0.02


class Peers:
    """All ranks of a group, whatever they share; every method is collective."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self._device = rank, ranks, device

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        if self.ranks == 1:
            return flag
        found = torch.tensor([float(flag)], device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def share(self, value: T) -> T:
        """The first rank's."""
        if self.ranks == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, device=self._device)
        shared: T = box[0]
        return shared

    def wait_while(self, busy: Callable[[], bool], beat: Callable[[], None] = lambda: None) -> None:
        """Until no rank is busy. It may take longer than a collective may: each of many is short.

        `beat` is called again and again, as a sign of life.
        """
        while self.any(busy()):
            beat()
            time.sleep(PAUSE_S)

    def _choose_device(self) -> Callable[[], None] | None:
        """What gives another thread the device of this one."""
        if self._device.type != "cuda":
            return None
        index = torch.cuda.current_device()
        return lambda: torch.cuda.set_device(index)

    def ask_first(self, function: Callable[[], T], beat: Callable[[], None] = lambda: None) -> T:
        """What `function` gives on the first rank, however long it takes; what it raises as
        `UserError` is raised on all."""
        if self.rank > 0:
            self.wait_while(lambda: False, beat)
            answer: Any = None
        else:
            with ThreadPoolExecutor(1, initializer=self._choose_device()) as pool:
                future = pool.submit(function)
                self.wait_while(lambda: not future.done(), beat)
            error = future.exception()
            if error is not None and not isinstance(error, UserError):
                raise error
            answer = ("", future.result()) if error is None else (str(error), None)
        refusal, value = self.share(answer)
        if refusal:
            raise UserError(refusal)
        given: T = value
        return given
