"""Processes for code that may do anything: confined, watched, and ended with all they left.

One fresh process for each completion, in a session of its own, with no environment, no files but
the interpreter's and an empty directory that is removed, no network, no other processes, and limits
on time, memory and output. Where the kernel cannot confine it nothing is run, unless that is asked
for. What is left open: a completion can use all that its limits allow, on as many threads as fit
into its memory, can read the interpreter's and the system's libraries, and can learn the time, the
kernel's version, and of any path whether a file is there and how large it is.
"""

from __future__ import annotations

import contextlib
import marshal
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raylign.config import SandboxConfig, UserError
from raylign.rewards import frames, guest
from raylign.rewards.confinement import compile_filter, list_readable, open_rules, survey_walls
from raylign.rewards.frames import Channel, Gone
from raylign.rewards.outcomes import SourceFailure

# What a fresh interpreter runs: the code of both modules arrives compiled, before the messages.
_ENTRY = """
import marshal, posix, sys
come, go, size = map(int, sys.argv[1:])
code = b""
while len(code) < size:
    code += posix.read(come, size - len(code))
frames, guest = {"__name__": "frames"}, {"__name__": "guest"}
for text, space in zip(marshal.loads(code), (frames, guest)):
    exec(text, space)
guest["main"](frames["Channel"](come, go))
"""
_START_S = 30.0
_LARGEST_ANSWER = 1 << 20
_MOST_FILES = 256
_TICK_S = 0.1
_PREFIX = "raylign-sandbox-"
# All that the interpreter hears of its surroundings; a fixed order of sets, so that the same
# completion gets the same verdict.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "LANG": "C.UTF-8",
    "PATH": "",
    "TZ": "UTC",
}


class SandboxFailure(SourceFailure):
    """The sandbox did not work; nothing is said about the completion."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a program printed, cut at the limit, and how it ended."""

    text: str
    status: int | None
    """Exit status, negative for a signal; None when it was stopped."""


class Sandbox:
    """Starts confined processes within the limits of `config`.

    Raises `UserError` where the kernel lacks Landlock or seccomp, unless `config.unsafe`. With
    `packages` the interpreter's installed packages can be imported, too.
    """

    def __init__(self, config: SandboxConfig, packages: bool = False) -> None:
        walls = survey_walls()
        if not (walls.complete or config.unsafe):
            raise UserError(
                f"align.reward.source=code: this kernel cannot confine a program ({walls}); use "
                "Linux 5.13 or later on x86-64 or ARM64 with both enabled, or set "
                "align.reward.sandbox.unsafe=true to run completions with your own rights"
            )
        self.config, self._packages, self._walls = config, packages, walls
        self._readable = list_readable(packages)
        _sweep()

    @contextlib.contextmanager
    def start(self, streams: bool = False) -> Iterator[Guest]:
        """A process that confines itself and has seen no foreign code yet; with `streams` its
        standard input and output are ours, else empty and lost. Raises `SandboxFailure`."""
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            with contextlib.ExitStack() as stack:
                rules = None
                if self._walls.landlock:
                    rules = stack.enter_context(open_rules(self._readable, directory))
                process = Guest(self.config, directory, rules, self._flags(), streams)
            try:
                process.instruct(
                    {
                        "parent": os.getpid(),
                        "limits": self._limits(),
                        "rules": rules,
                        "filter": compile_filter() if self._walls.seccomp else None,
                        "directory": str(directory),
                    }
                )
                yield process
            finally:
                process.end()
        except OSError as error:
            raise SandboxFailure(f"{type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _limits(self) -> dict[str, tuple[int, int]]:
        config, second = self.config, math.ceil(self.config.seconds)
        memory, file = config.memory_mb << 20, config.files_mb << 20
        return {
            "AS": (memory, memory),
            "CPU": (second + 1, second + 2),
            "FSIZE": (file, file),
            "NOFILE": (64, 64),
            "CORE": (0, 0),
        }

    def _flags(self) -> list[str]:
        return ["-s", "-P", "-B", *([] if self._packages else ["-S"])]


class Guest:
    """A confined process and the pipes to it."""

    def __init__(
        self,
        config: SandboxConfig,
        directory: Path,
        rules: int | None,
        flags: list[str],
        streams: bool,
    ) -> None:
        self._config, self._directory = config, directory
        self._confined = False
        to_read, to_write = os.pipe(), os.pipe()
        inherited = (to_read[0], to_write[1], *([] if rules is None else [rules]))
        code = _compile_guest()
        numbers = [str(number) for number in (to_read[0], to_write[1], len(code))]
        try:
            os.write(to_read[1], code)  # a pipe holds more than that
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", _ENTRY, *numbers],
                stdin=subprocess.PIPE if streams else subprocess.DEVNULL,
                stdout=subprocess.PIPE if streams else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                cwd="/",
                pass_fds=inherited,
                start_new_session=True,
            )
        except OSError:
            os.close(to_read[1])
            os.close(to_write[0])
            raise
        finally:
            os.close(to_read[0])
            os.close(to_write[1])
        self._channel = Channel(to_write[0], to_read[1], _LARGEST_ANSWER)

    def instruct(self, orders: dict[str, Any]) -> None:
        """Tell it how to confine itself; what fails here and in `await_walls` is no completion's
        fault. Raises `SandboxFailure`."""
        try:
            self._channel.send(orders, time.monotonic() + _START_S)
        except (Gone, TimeoutError) as error:
            raise SandboxFailure(f"the sandbox did not start: {error}") from None

    def await_walls(self) -> None:
        """Wait until it is confined, which `send` does too. Raises `SandboxFailure`."""
        if self._confined:
            return
        try:
            state, reason = self._channel.receive(time.monotonic() + _START_S)
        except (Gone, TimeoutError) as error:
            raise SandboxFailure(f"the sandbox did not start: {error}") from None
        if state != "confined":
            raise SandboxFailure(f"the sandbox could not confine itself: {reason}")
        self._confined = True

    def trust(self) -> None:
        """Let it send messages of any length: it runs the tests, and no foreign code."""
        self._channel.widen()

    def send(self, message: Any, until: float) -> None:
        """Raises `Gone` when it ended, `TimeoutError` at `until`, by `time.monotonic`."""
        self.await_walls()
        self._channel.send(message, until)

    def receive(self, until: float) -> Any:
        """Its next message; raises like `send`, and `Gone` when it writes too many files."""
        while True:
            try:
                return self._channel.receive(min(until, time.monotonic() + _TICK_S))
            except TimeoutError:
                self._check_files()
                if time.monotonic() >= until:
                    raise

    def run(self, source: str, text: str, until: float) -> Output:
        """Run a program with `text` as its standard input; it is stopped at `until`."""
        self.send(("program", source), until)
        pipes: dict[int, Any] = {}
        poll = select.poll()
        incoming, outgoing = self._process.stdout, self._process.stdin
        assert incoming is not None and outgoing is not None
        for pipe, event in ((incoming, select.POLLIN), (outgoing, select.POLLOUT)):
            os.set_blocking(pipe.fileno(), False)
            poll.register(pipe, event)
            pipes[pipe.fileno()] = pipe
        left, kept = memoryview(text.encode("utf-8", "surrogatepass")), bytearray()
        while incoming.fileno() in pipes:
            if time.monotonic() >= until:
                return Output(_decode(kept), None)
            for number, _ in poll.poll(_TICK_S * 1000):
                try:
                    if number == incoming.fileno():
                        more = os.read(number, 1 << 16)
                        kept += more[: max(self._config.output_kb * 1024 - len(kept), 0)]
                        done = not more
                    else:
                        left = left[os.write(number, left) :] if left else left
                        done = not left
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    done = True
                if done:
                    poll.unregister(number)
                    if pipes.pop(number) is outgoing:
                        outgoing.close()
            try:
                self._check_files()
            except Gone:
                return Output(_decode(kept), None)
        return Output(_decode(kept), self._await_end(until))

    def end(self) -> None:
        """Kill what is left of it. Raises `SandboxFailure` when something else already had."""
        ended = _peek(self._process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _, _, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = 0
        self._channel.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        # It cannot send signals and dies of its own limits only after using up its time.
        used = usage.ru_utime + usage.ru_stime
        if ended == -signal.SIGKILL and used < self._config.seconds:
            raise SandboxFailure("something outside killed the sandbox (out of memory?)")

    def linger(self) -> None:
        """After `Gone`: give it a moment to end by itself, so that `end` learns how it did."""
        self._await_end(time.monotonic() + 0.3)

    def _await_end(self, until: float) -> int | None:
        while (status := _peek(self._process.pid)) is None and time.monotonic() < until:
            time.sleep(0.001)
        return status

    def _check_files(self) -> None:
        sizes = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(entry.stat(follow_symlinks=False).st_size)
        if len(sizes) > _MOST_FILES or sum(sizes) > 4 * (self._config.files_mb << 20):
            raise Gone("it fills the disk")


@cache
def _compile_guest() -> bytes:
    paths = [Path(str(module.__file__)) for module in (frames, guest)]
    codes = [compile(path.read_text(encoding="utf-8"), path.name, "exec") for path in paths]
    return marshal.dumps(codes)


def _sweep() -> None:
    """Remove the directories of judges that were killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}[0-9]*-*"):
        judge = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", judge).exists():
            shutil.rmtree(directory, ignore_errors=True)


def _peek(process: int) -> int | None:
    """Its exit status, negative for a signal; None while it runs. It stays to be waited for."""
    info = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _decode(data: bytes | bytearray) -> str:
    return bytes(data).decode("utf-8", "replace")
