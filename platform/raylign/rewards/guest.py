"""What runs inside the walls: a process that confines itself, then does as it is told.

Its code is sent, once for each completion, to an interpreter that has nothing of ours. It learns
what to run over one pipe and answers over another. Nothing that it answers is a verdict: a
*candidate* says what a call returned, and an *examiner*, which never runs a line of the candidate's
code, says whether a test passed.
"""

from __future__ import annotations

import builtins
import os
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:  # these two modules would take longer to load than all else here
    from collections.abc import Callable
    from typing import Any

_LONGEST_WAIT = 1e9


class _Unusable(BaseException):
    """A test asks for what cannot travel between processes."""


def confine(orders: dict[str, Any]) -> None:
    """Give up everything but what `orders` leave; raises `OSError` when the kernel refuses."""
    import ctypes
    import resource

    library = ctypes.CDLL(None, use_errno=True)

    def control(*arguments: Any) -> None:
        if library.prctl(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)):
            raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")

    control(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: no longer than the judge
    if os.getppid() != orders["parent"]:
        raise OSError("the judge is gone")
    for name, (soft, hard) in orders["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    control(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    # Even of root nothing is left but its name.
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if library.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")
    if orders["rules"] is not None:
        if library.syscall(ctypes.c_long(446), orders["rules"], 0):
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        os.close(orders["rules"])
    if orders["filter"] is not None:

        class Program(ctypes.Structure):
            _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

        program = Program(len(orders["filter"]) // 8, orders["filter"])
        control(22, 2, ctypes.byref(program), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def answer_calls(channel: Any, source: str) -> None:
    """Load a candidate, then call its functions until nobody asks any more."""
    module = ModuleType("candidate")
    sys.modules["candidate"] = module

    def load() -> None:
        exec(compile(source, "candidate.py", "exec"), vars(module))

    channel.send(_attempt(channel, load), _LONGEST_WAIT)
    while True:
        name, arguments, keywords = channel.receive(_LONGEST_WAIT)

        def call() -> Any:
            return _resolve(module, name)(*arguments, **keywords)  # noqa: B023

        channel.send(_attempt(channel, call), _LONGEST_WAIT)


def _attempt(channel: Any, action: Callable[[], Any]) -> tuple[Any, ...]:
    try:
        value = action()
        channel.check(value)
        return "value", value
    except BaseException as error:  # whatever foreign code raises, exit included, is reported
        return "raised", type(error).__name__, str(error)[:500]


def _resolve(module: ModuleType, name: str) -> Any:
    """`f`, or `Class.f` of an instance made without arguments."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def run_program(source: str) -> None:
    """Run a candidate as a script, on the standard input and output that this process has."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(source, "candidate.py", "exec"), vars(module))


def examine(channel: Any, setup: str, names: dict[str, str]) -> None:
    """Run tests; `names` gives what they call by what the candidate calls it."""
    space: dict[str, Any] = {"__name__": "tests"}
    for name, original in names.items():
        space[name] = _make_proxy(channel, original)
    channel.send(_judge(setup, space), _LONGEST_WAIT)
    while True:
        channel.send(_judge(channel.receive(_LONGEST_WAIT), space), _LONGEST_WAIT)


def _judge(code: str, space: dict[str, Any]) -> tuple[str, str]:
    try:
        exec(compile(code, "tests.py", "exec"), space)
    except _Unusable as error:
        return "unusable", str(error)
    except BaseException as error:  # of the tests, or of what the candidate returned to them
        return "failed", f"{type(error).__name__}: {error}"[:500]
    return "passed", ""


def _make_proxy(channel: Any, name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            channel.check((arguments, keywords))
        except TypeError as error:
            raise _Unusable(f"{name} is called with what is no plain value: {error}") from None
        channel.send(("call", name, arguments, keywords), _LONGEST_WAIT)
        kind, content = channel.receive(_LONGEST_WAIT)
        if kind == "value":
            return content
        raised: Any = getattr(builtins, content[0], None)
        known = isinstance(raised, type) and issubclass(raised, Exception)
        kind_of_error: Callable[[str], Exception] = raised if known else RuntimeError
        raise kind_of_error(content[1])

    return call


def main(channel: Any) -> None:
    """Confine this process, then play the role that it is told."""
    orders = channel.receive(_LONGEST_WAIT)
    try:
        confine(orders)
    except OSError as error:
        channel.send(("open", str(error)), _LONGEST_WAIT)
        return
    os.chdir(orders["directory"])
    sys.argv[:] = ["candidate.py"]
    channel.send(("confined", ""), _LONGEST_WAIT)
    role, *rest = channel.receive(_LONGEST_WAIT)
    if role == "program":
        channel.close()
        run_program(*rest)
    elif role == "candidate":
        answer_calls(channel, *rest)
    else:
        examine(channel, *rest)
