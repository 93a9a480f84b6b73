"""Breaks from within what no signal breaks; Python imports it in every process of a run that has
this directory on its path.

`RAYLIGN_FAULT` names the fault. What happens once a run is marked by a file of its name in
`RAYLIGN_FAULT_DIRECTORY`, whose time is that of the fault.
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


def happens_once(fault: str) -> bool:
    """Whether this is the first time in this run."""
    try:
        Path(os.environ["RAYLIGN_FAULT_DIRECTORY"], fault).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def change_generator(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Break every generator of this process, whichever it is, before it is used."""

    def install(module: Any) -> None:
        begin = module.GeneratorLoop.__init__

        @functools.wraps(begin)
        def begin_broken(self: Any, generator: Any) -> None:
            change(generator)
            begin(self, generator)

        module.GeneratorLoop.__init__ = begin_broken

    return install


def serve_old_weights(generator: Any) -> None:
    """A worker that was born late says it has the weights it was given, and has its own still."""
    load, seen = generator.load_weights, []

    def claim(version: int, tensors: Iterable[Any]) -> None:
        late = not seen and version >= 3
        seen.append(version)
        load(version, () if late and happens_once("stale") else tensors)

    generator.load_weights = claim


def stop_in_decode(number: int) -> Callable[[Any], None]:
    """A signal to the process of an engine, with requests in flight."""

    def change(generator: Any) -> None:
        advance = generator.advance

        def step() -> Any:
            done = advance()
            begun = getattr(generator, "version", -1) >= 2 and generator.pending
            if begun and happens_once("decode"):
                os.kill(os.getpid(), number)
            return done

        generator.advance = step

    return change


def die_in_transfer(module: Any) -> None:
    """A worker's process ends between the first and the last tensor of a version."""
    adopt = module.receive_weights

    @functools.wraps(adopt)
    def die(manifest: Any, worker: str = "worker") -> Iterator[Any]:
        for count, tensor in enumerate(adopt(manifest, worker)):
            if count == 1 and manifest.version == 3 and happens_once("transfer"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor

    module.receive_weights = die


def lose_request(module: Any) -> None:
    """Whoever has the first prompt of step 1 forgets it, every time."""
    kind = module.RolloutWorker
    finish = kind._finish

    @functools.wraps(finish)
    def forget(self: Any, errand: Any, start: float, future: Any) -> None:
        if errand.request.group != "1/0":
            finish(self, errand, start, future)
        else:
            happens_once("request")
            self._open.pop(errand.key, None)

    kind._finish = forget


def block_training(module: Any) -> None:
    """The second rank's thread that learns never comes back from step 2; the process lives on."""
    kind = module.PolicyLearner
    update = kind.update

    @functools.wraps(update)
    def block(self: Any, *arguments: Any) -> Any:
        if self.version == 2 and os.environ.get("RANK") == "1" and happens_once("block"):
            time.sleep(3600)
        return update(self, *arguments)

    kind.update = block


SERVING = "raylign.inference.serving"
FAULTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "serve_old_weights": (SERVING, change_generator(serve_old_weights)),
    "kill_in_decode": (SERVING, change_generator(stop_in_decode(signal.SIGKILL))),
    "freeze_in_decode": (SERVING, change_generator(stop_in_decode(signal.SIGSTOP))),
    "die_in_transfer": ("actors.weights", die_in_transfer),
    "lose_request": ("actors.rollout", lose_request),
    "block_training": ("raylign.training.policy", block_training),
}


class Saboteur(MetaPathFinder):
    """Lets a module load, and then breaks it."""

    def __init__(self, name: str, breaks: Callable[[Any], None]) -> None:
        self._name, self._breaks = name, breaks

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_break(module: Any) -> None:
            load(module)
            self._breaks(module)

        spec.loader.exec_module = load_and_break  # type: ignore[method-assign]
        return spec


if os.environ.get("RAYLIGN_FAULT"):
    sys.meta_path.insert(0, Saboteur(*FAULTS[os.environ["RAYLIGN_FAULT"]]))
