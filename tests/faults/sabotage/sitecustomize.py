"""Breaks from within what no signal breaks; Python imports it in every process of a run that has
this directory on its path.

A fault happens once a run, when a file `arm-FAULT` is there in `RAYLIGN_FAULT_DIRECTORY`; a file
`FAULT` then marks its time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

DIRECTORY = Path(os.environ.get("RAYLIGN_FAULT_DIRECTORY", "/nowhere"))


def happens(fault: str, text: str = "") -> bool:
    """Whether it is to happen here and now."""
    if not (DIRECTORY / f"arm-{fault}").exists():
        return False
    try:
        with (DIRECTORY / fault).open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def break_generators(module: Any) -> None:
    """Every generator of this process, whichever it is, before it is used."""
    begin = module.GeneratorLoop.__init__

    @functools.wraps(begin)
    def begin_broken(self: Any, generator: Any) -> None:
        stop_in_decode(generator)
        serve_old_weights(generator)
        begin(self, generator)

    module.GeneratorLoop.__init__ = begin_broken


def stop_in_decode(generator: Any) -> None:
    """`kill`, `freeze`: a signal to the process of an engine, with requests in flight."""
    advance = generator.advance

    def step() -> Any:
        done = advance()
        if generator.pending and happens("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if generator.pending and happens("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return done

    generator.advance = step


def serve_old_weights(generator: Any) -> None:
    """`stale`: a worker that was born late says it has the weights it was given, and has those that
    it was born with."""
    load, seen = generator.load_weights, []

    def claim(version: int, tensors: Iterable[Any]) -> None:
        late = not seen and version >= 3
        seen.append(version)
        load(version, () if late and happens("stale") else tensors)

    generator.load_weights = claim


def die_in_transfer(module: Any) -> None:
    """`transfer`: a worker's process ends between the first and the last tensor of a version."""
    receive = module.receive_weights

    @functools.wraps(receive)
    def die(manifest: Any, worker: str = "worker") -> Iterator[Any]:
        for count, tensor in enumerate(receive(manifest, worker)):
            if count == 1 and happens("transfer"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor

    module.receive_weights = die


def lose_request(module: Any) -> None:
    """`request`: whoever has a certain one forgets it, every time."""
    finish = module.RolloutWorker._finish

    @functools.wraps(finish)
    def forget(self: Any, errand: Any, start: float, future: Any) -> None:
        group, mark = errand.request.group, DIRECTORY / "request"
        if happens("request", group) or (mark.exists() and mark.read_text() == group):
            self._open.pop(errand.key, None)
        else:
            finish(self, errand, start, future)

    module.RolloutWorker._finish = forget


def harm_ranks(module: Any) -> None:
    """`kill-rank-N`, `freeze-rank-N`: a signal to the process of a learner rank; `block-rank-N`:
    its thread that learns never comes back, and its process lives on."""
    update = module.PolicyLearner.update

    @functools.wraps(update)
    def harm(self: Any, *arguments: Any) -> Any:
        rank = f"rank-{os.environ.get('RANK')}"
        if happens(f"kill-{rank}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if happens(f"freeze-{rank}"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if happens(f"block-{rank}"):
            time.sleep(3600)
        return update(self, *arguments)

    module.PolicyLearner.update = harm


FAULTS: dict[str, Callable[[Any], None]] = {
    "raylign.inference.serving": break_generators,
    "actors.weights": die_in_transfer,
    "actors.rollout": lose_request,
    "raylign.training.policy": harm_ranks,
}


class Saboteur(MetaPathFinder):
    """Lets modules load, and then breaks them."""

    def __init__(self) -> None:
        self._left = dict(FAULTS)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        breaks = self._left.pop(name, None)
        if breaks is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_break(module: Any) -> None:
            load(module)
            breaks(module)

        spec.loader.exec_module = load_and_break  # type: ignore[method-assign]
        return spec


if DIRECTORY.is_dir():
    sys.meta_path.insert(0, Saboteur())
