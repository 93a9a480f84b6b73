"""A real `jobs.align` in a process of its own, watched from outside as an operator would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raylign.run import hash_file
from raylign.tracking import EVENTS_FILE, METRICS_FILE, GrowingLines

ROOT = Path(__file__).resolve().parents[2]
MARK = "RAYLIGN_FAULT_MARK"
SABOTAGE = Path(__file__).parent / "sabotage"
START_S = 300.0  # a machine under load takes long to start so many processes
_RAYLET = "(raylet)"
_TITLE = re.compile(r"ray::(\w+)")


class Overdue(AssertionError):
    """Something did not happen in time."""


@dataclass(frozen=True)
class Finish:
    """How a run ended."""

    status: int
    output: str
    seconds: float

    @property
    def last(self) -> str:
        """Its last line; Ray may still write of workers that it found dead."""
        lines = [line for line in self.output.splitlines() if line.strip() and _RAYLET not in line]
        return lines[-1].strip() if lines else ""


class AlignRun:
    """One run directory and the processes that work on it, one after another."""

    def __init__(self, root: Path, model: Path, prompts: Path, *settings: str) -> None:
        """settings: `align.` keys and values, in addition to those of a small run."""
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._recipe = root / "recipe.yaml"
        self._recipe.write_text(f"run: {root / 'run'}\nseed: 5\nalign: {{}}\n", encoding="utf-8")
        small = (
            f"model={model}",
            f"prompts={prompts}",
            "steps=4",
            "prompts_per_step=6",
            "group_size=4",
            "max_staleness=1",
            "checkpoint_every=2",
            "sampling={max_tokens: 16}",
            "algorithm={name: grpo, kl_coef: 0.01}",
            "optimizer={lr: 0.001, weight_decay: 0.0}",
            "schedule={shape: constant, warmup_steps: 0}",
            "reward={source: 'tests.faults.rewards:variety', weights: {variety: 1.0}}",
            "rollout={max_sequences: 24, kv_cache_mb: 32, stall_s: 4, deadline_s: 60}",
            "learner={token_budget: 512}",
            "engine={backend: torch, timeout_s: 8}",
            "mismatch_sample: 4".replace(": ", "="),
            "sinks={tensorboard: false}",
        )
        self._settings = [f"align.{setting}" for setting in (*small, *settings)]
        self.faults = root / "faults"
        self.faults.mkdir(exist_ok=True)
        self.stage = root / "run" / ".align.partial"
        self.done = root / "run" / "align"
        self.mark = uuid.uuid4().hex
        self._process: subprocess.Popen[str] | None = None
        self._started = 0.0

    def start(self, *settings: str, **environment: str) -> AlignRun:
        """Begin, or go on; `environment` is what all of its processes see."""
        command = [sys.executable, "-m", "jobs.align", str(self._recipe), *self._settings]
        log = (self.root / "output.log").open("w")
        paths = [str(SABOTAGE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        own = {
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "RAY_prestart_worker_first_driver": "0",  # nobody would use them
            "RAYLIGN_FAULT_DIRECTORY": str(self.faults),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        self._process = subprocess.Popen(
            [*command, *(f"align.{setting}" for setting in settings)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | own | environment,
        )
        self._started = time.monotonic()
        self._lines = {
            place / name: GrowingLines(place / name)
            for place in (self.stage, self.done)
            for name in (EVENTS_FILE, METRICS_FILE)
        }
        return self

    def _read(self, name: str) -> list[dict[str, Any]]:
        """Rows of the stage in the making, or of the finished one."""
        place = self.done if self.done.is_dir() else self.stage
        return self._lines[place / name].read()

    @property
    def driver(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        assert self._process is not None
        return self._process.poll() is None

    def processes(self, role: str) -> list[psutil.Process]:
        """Of the actors of a class, such as `RolloutWorker`, oldest first."""
        found = []
        for process in self._all():
            try:
                title = _TITLE.match(" ".join(process.cmdline()))
                if title and title[1] == role and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def wait_for_another(self, role: str, known: Sequence[psutil.Process]) -> list[psutil.Process]:
        """Processes of a role that are none of those."""
        pids = {process.pid for process in known}

        def find() -> list[psutil.Process]:
            return [process for process in self.processes(role) if process.pid not in pids]

        found: list[psutil.Process] = self.wait(f"another {role}", find)
        return found

    def left_behind(self) -> list[psutil.Process]:
        """Processes of this run that are still there."""
        return [p for p in self._all() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def _all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def events(self, **wanted: Any) -> list[dict[str, Any]]:
        """Those whose fields are as wanted."""
        return [
            row
            for row in self._read(EVENTS_FILE)
            if all(row.get(name) == value for name, value in wanted.items())
        ]

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step."""
        return self._read(METRICS_FILE)

    def wait(self, what: str, condition: Callable[[], Any], deadline_s: float = START_S) -> Any:
        """What `condition` gives once it is true. Raises `Overdue` with what was waited for."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            found = condition()
            if found:
                return found
            assert self._process is not None
            if self._process.poll() is not None:
                found = condition()
                if found:
                    return found
                raise Overdue(f"{what}: the run ended before\n{self.output()[-3000:]}")
            time.sleep(0.05)
        raise Overdue(f"{what}: not within {deadline_s:.0f} s\n{self.output()[-3000:]}")

    def wait_for_step(self, step: int, deadline_s: float = START_S) -> None:
        """Until metrics of a step are there."""
        self.wait(
            f"step {step}", lambda: any(row["step"] >= step for row in self.metrics()), deadline_s
        )

    def arm(self, fault: str) -> None:
        """Let a fault of `sabotage` happen, once, from now on."""
        (self.faults / f"arm-{fault}").touch()

    def struck(self, fault: str, deadline_s: float = START_S) -> float:
        """When a fault of `sabotage` happened, in seconds of the clock; waits for it."""
        file = self.faults / fault
        self.wait(f"fault {fault}", file.exists, deadline_s)
        return file.stat().st_mtime

    def hurry(self) -> None:
        """Rewards that are `paced` come at once from now on."""
        (self.faults / "hurry").touch()

    def kill(self, processes: Sequence[psutil.Process], number: int = signal.SIGKILL) -> float:
        """Send a signal; when, in seconds of the clock."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it was faster
                process.send_signal(number)
        return time.time()

    def output(self) -> str:
        return (self.root / "output.log").read_text(errors="replace")

    def finish(self, deadline_s: float = 600.0) -> Finish:
        """Wait for its end. Raises `Overdue`."""
        assert self._process is not None
        try:
            status = self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise Overdue(f"no end within {deadline_s:.0f} s\n{self.output()[-3000:]}") from None
        return Finish(status, self.output(), time.monotonic() - self._started)

    def stop(self) -> None:
        """Kill everything that is left."""
        for process in self._all():
            try:
                process.send_signal(signal.SIGCONT)
                process.kill()
            except psutil.Error:
                continue
        if self._process is not None:
            self._process.wait(30)

    def summary(self) -> dict[str, Any]:
        """Of the finished stage."""
        body: dict[str, Any] = json.loads((self.done / "manifest.json").read_text())
        return body["summary"]

    def weights(self) -> str:
        """sha256 of the final policy's weights."""
        return hash_file(self.done / "model" / "model.safetensors")

    def lost(self) -> int:
        """Completions that were dispatched and of which the finished stage knows nothing."""
        summary = self.summary()
        dropped = sum(v for k, v in summary.items() if k.startswith("dropped/"))
        return int(summary["dispatched"] - summary["trained"] - dropped)
