"""Nothing gets out of the sandbox, and nobody in it decides what it is worth."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylign.config import SandboxConfig, UserError
from raylign.rewards import confinement, guest, sandbox
from raylign.rewards.confinement import Walls, survey_walls
from raylign.rewards.programs import CodeVerifier
from raylign.rewards.sandbox import Sandbox, SandboxFailure

SECRET = "sesame-5c1f"
# A verdict that proves that what came before it was tried and failed: f(1) is 2 then.
GOOD = "def f(x):\n    return x + 1\n"
REFERENCE = json.dumps({"tests": ["assert f(1) == 2", "assert f(41) == 42"]})
PASSED = {"correct": 1.0, "passed": 1.0}
FAILED = {"correct": 0.0, "passed": 0.0}

pytestmark = pytest.mark.skipif(not survey_walls().complete, reason="kernel cannot confine")


@pytest.fixture(scope="module")
def verify() -> CodeVerifier:
    return CodeVerifier(SandboxConfig(seconds=2, memory_mb=256, files_mb=4))


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory that is not the sandbox's, with a secret in a file of mode 0600."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "secret").write_text(SECRET)
        (place / "secret").chmod(0o600)
        yield place


def attack(body: str) -> str:
    """A function that reports what `body` leaves in `found`, or the error it ran into."""
    indented = "\n".join(f"        {line}" for line in body.strip().splitlines())
    return (
        "import os, sys, ctypes\n"
        "def f(x):\n"
        "    found = 'nothing'\n"
        "    try:\n"
        f"{indented}\n"
        "    except BaseException as error:\n"
        "        return f'held: {type(error).__name__} {error}'\n"
        "    return f'escaped: {found}'\n"
    )


def report(config: SandboxConfig, body: str) -> str:
    """What the attack says of itself."""
    with Sandbox(config).start() as process:
        until = time.monotonic() + 5
        process.send(("candidate", attack(body)), until)
        assert process.receive(until)[0] == "value"
        process.send(("f", (1,), {}), until)
        return str(process.receive(until)[1])


SYSCALLS = {"x86_64": (101, 425, 62, 90, 310, 240), "aarch64": (117, 425, 129, 53, 270, 180)}
PTRACE, IO_URING, KILL, CHMOD, READ_MEMORY, QUEUE = SYSCALLS.get(os.uname().machine, (0,) * 6)
CALL = "libc = ctypes.CDLL(None, use_errno=True)\n"
REFUSED = "if found < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
ATTACKS = {
    "connect": "import socket; found = socket.create_connection(('127.0.0.1', {port}), 1)",
    "datagram": "import socket; found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "import socket; found = socket.socketpair()",
    "read outside": "found = open('{outside}/secret').read()",
    "list outside": "found = os.listdir('{outside}')",
    "write outside": "found = open('{outside}/new', 'w').write('x')",
    "truncate outside": "os.truncate('{outside}/secret', 0)",
    "chmod outside": "os.chmod('{outside}/secret', 0o666)",
    "chmod by number": (
        f"{CALL}found = libc.syscall({CHMOD}, b'{{outside}}/secret', 438)\n{REFUSED}"
    ),
    "delete outside": "os.remove('{outside}/secret')",
    "move outside": "open('x', 'w').close(); os.rename('x', '{outside}/x')",
    "link to outside": "os.link('{outside}/secret', 'mine')",
    "symlink to outside": "os.symlink('{outside}/secret', 'mine'); found = open('mine').read()",
    "path through ..": "found = open('../' * 20 + '{outside}/secret'.lstrip('/')).read()",
    "parent's environment": "found = open('/proc/{parent}/environ', 'rb').read()",
    "parent's memory": "found = open('/proc/{parent}/mem', 'rb').read(1)",
    "memory by call": (
        f"{CALL}found = libc.syscall({READ_MEMORY}, {{parent}}, 0, 0, 0, 0, 0)\n{REFUSED}"
    ),
    "own command line": "found = open('/proc/self/cmdline', 'rb').read()",
    "kill": f"{CALL}found = libc.syscall({KILL}, {{victim}}, 9)\n{REFUSED}",
    "kill its parent": "os.kill(os.getppid(), 15)",
    "signal through a descriptor": (
        "import fcntl\n"
        "end, _ = os.pipe()\n"
        "found = fcntl.fcntl(end, 10, 9), fcntl.fcntl(end, fcntl.F_SETOWN, {victim})"
    ),
    "message queue": f"{CALL}found = libc.syscall({QUEUE}, b'q', 66, 384, 0)\n{REFUSED}",
    "shared memory": f"{CALL}found = libc.shmget(7, 4096, 0o1666)\n{REFUSED}",
    "file in memory": "found = os.memfd_create('x')",
    "extended attribute": "found = os.setxattr('{outside}/secret', 'user.x', b'1')",
    "times of a file": "found = os.utime('{outside}/secret', (0, 0))",
    "directories": "found = os.mkdir('sub')",
    "named pipe": "found = os.mkfifo('pipe')",
    "ptrace": f"{CALL}found = libc.syscall({PTRACE}, 16, {{victim}}, 0, 0)\n{REFUSED}",
    "io_uring": f"{CALL}found = libc.syscall({IO_URING}, 8, 0)\n{REFUSED}",
    "fork": "found = os.fork()",
    "spawn": "import subprocess; found = subprocess.run(['/bin/true'])",
    "execute": "os.execv('/bin/true', ['true'])",
    "raise limits": (
        "import resource; found = resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
    ),
    "new session": "found = os.setsid()",
    "allocate 3 GB": "found = len(bytearray(3 << 30))",
    "write 300 MB": (
        "with open('big', 'wb') as file:\n"
        "    for _ in range(300): found = file.write(bytes(1 << 20))"
    ),
    "mount": f"{CALL}found = libc.mount(b'none', b'/', b'tmpfs', 0, None)\n{REFUSED}",
    "namespaces": f"{CALL}found = libc.unshare(0x10000000)\n{REFUSED}",
    "edit the grader": "found = open('{grader}', 'a').write('x')",
    "edit the guest": "found = open('{guest}', 'a').write('x')",
    "edit a library": "import json; found = open(json.__file__, 'a').write('x')",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_held(
    name: str, outside: Path, verify: CodeVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLIGN_TEST_SECRET", SECRET)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim,
    ):
        try:
            body = ATTACKS[name].format(
                port=server.getsockname()[1],
                outside=outside,
                parent=os.getpid(),
                victim=victim.pid,
                grader=sandbox.__file__,
                guest=guest.__file__,
            )
            said = report(SandboxConfig(seconds=2, memory_mb=256, files_mb=4), body)
            assert said.startswith("held: ")
            assert SECRET not in said
            assert victim.poll() is None
        finally:
            victim.kill()
    assert (outside / "secret").read_text() == SECRET
    assert (outside / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_nothing_of_our_environment_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_TEST_SECRET", SECRET)
    said = report(SandboxConfig(), "found = dict(os.environ), sys.path, sys.argv, os.listdir('.')")
    assert SECRET not in said and "raylign/" not in said


FORGERIES = {
    "exit before the tests": "raise SystemExit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit when called": "import os\ndef f(x): os._exit(0)",
    "always equal": (
        "class Same(int):\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 0\n"
        "def f(x): return Same(7)"
    ),
    "other builtins": (
        "import builtins\n"
        "builtins.AssertionError = type('Never', (Exception,), {})\n"
        "builtins.compile = lambda *a: ''\n"
        "builtins.isinstance = lambda *a: True\n"
        "def f(x): return 0"
    ),
    "a verdict printed": (
        "print('passed'); print('{\"correct\": 1.0, \"passed\": 1.0}', flush=True)\n"
        "def f(x): print('passed'); return 'passed'"
    ),
    "a verdict on every pipe": (
        "import os\n"
        "for n in range(64):\n"
        "    for text in (b'\\x00' * 64, b'passed', b'l\\x00\\x00\\x00\\x00'):\n"
        "        try: os.write(n, text)\n"
        "        except OSError: pass\n"
        "def f(x): return 0"
    ),
    "the messages' own code": (
        "import sys, gc\n"
        "for thing in gc.get_objects():\n"
        "    if type(thing).__name__ == 'Channel':\n"
        "        for _ in range(5): thing.send(('passed', ''), 1e9)\n"
        "        for _ in range(5): thing.send(('value', True), 1e9)\n"
        "def f(x): return 0"
    ),
    "the caller's frames": (
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for name, value in list(frame.f_locals.items()):\n"
        "            if value == 2 or value == 42: return value\n"
        "        frame = frame.f_back\n"
        "    return 0"
    ),
    "a flood of messages": (
        "import gc\n"
        "channel = [t for t in gc.get_objects() if type(t).__name__ == 'Channel'][0]\n"
        "while True: channel.send(('value', 0), 1e9)"
    ),
    "a huge answer": "def f(x): return 'x' * (50 << 20)",
    "a deep answer": "def f(x):\n    r = []\n    for _ in range(10**5): r = [r]\n    return r",
    "signals ignored": (
        "import signal\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "def f(x):\n"
        "    while True: pass"
    ),
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads without end": (
        "import threading, time\n"
        "threading.stack_size(1 << 15)\n"
        "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    ),
    "200 MB printed": "import sys\nfor _ in range(200): sys.stdout.write('x' * (1 << 20))\nf = 0",
    "many files": "def f(x):\n    for n in range(10**9): open(str(n), 'w').write('x')",
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("kind", ["values", "script"])
def test_no_forgery_is_worth_anything_and_the_next_sample_is_judged_as_ever(
    name: str, kind: str, verify: CodeVerifier
) -> None:
    reference = REFERENCE
    if kind == "script":
        if "bomb" in name or "files" in name or "MB" in name or "signals" in name:
            pytest.skip("the candidate's process is the same as with values")
        reference = json.dumps({"tests": "def check(c):\n    assert c(1) == 2\n", "entry": "f"})
    before, started = set(os.listdir(tempfile.gettempdir())), time.monotonic()
    assert verify(FORGERIES[name], reference) == FAILED
    assert time.monotonic() - started < 2 + 3
    assert verify(GOOD, reference) == PASSED
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith(f"raylign-sandbox-{os.getpid()}-")]


def test_no_process_outlives_its_verdict(verify: CodeVerifier) -> None:
    import psutil

    verify("import time\ndef f(x): time.sleep(60)", REFERENCE)
    assert not [p for p in psutil.Process().children() if "marshal" in " ".join(p.cmdline())]


def test_a_printing_program_is_cut_and_stopped() -> None:
    config = SandboxConfig(seconds=1, output_kb=4)
    started = time.monotonic()
    with Sandbox(config).start(streams=True) as process:
        output = process.run("while True: print('x' * 1000)", "", time.monotonic() + 1)
    assert output.status is None and len(output.text) == 4096
    assert time.monotonic() - started < 4


def test_a_dead_judge_takes_the_sandbox_along() -> None:
    code = (
        "import os, sys, time\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from raylign.config import SandboxConfig\n"
        "from raylign.rewards.sandbox import Sandbox\n"
        "with Sandbox(SandboxConfig()).start() as guest:\n"
        "    guest.send(('candidate', 'while True: pass'), time.monotonic() + 5)\n"
        "    print(guest._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    process, until = int(done.stdout), time.monotonic() + 3
    Sandbox(SandboxConfig())
    judges = [path.name.split("-")[2] for path in Path(tempfile.gettempdir()).glob("raylign-sand*")]
    assert all(Path("/proc", judge).exists() for judge in judges)  # what it left is removed
    while Path(f"/proc/{process}").exists() and time.monotonic() < until:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return
        time.sleep(0.02)
    assert not Path(f"/proc/{process}").exists()


def test_a_sandbox_that_is_killed_from_outside_says_nothing_of_the_completion() -> None:
    with (
        pytest.raises(SandboxFailure, match="something outside killed"),
        Sandbox(SandboxConfig()).start() as process,
    ):
        process.send(("candidate", "import time; time.sleep(60)"), time.monotonic() + 5)
        threading.Timer(0.2, os.kill, (process._process.pid, 9)).start()
        with pytest.raises(sandbox.Gone):
            process.receive(time.monotonic() + 5)
        process.linger()


def test_without_walls_nothing_runs_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for walls, says in ((Walls(0, True), "no Landlock"), (Walls(4, False), "no seccomp")):
        monkeypatch.setattr(sandbox, "survey_walls", lambda walls=walls: walls)
        monkeypatch.setattr(confinement, "survey_walls", lambda walls=walls: walls)
        with pytest.raises(UserError, match=says) as error:
            CodeVerifier(SandboxConfig())
        assert "align.reward.sandbox.unsafe=true" in str(error.value)
        assert CodeVerifier(SandboxConfig(unsafe=True))(GOOD, REFERENCE) == PASSED


@pytest.mark.parametrize("version", [1, 3, 5])
def test_older_kernels_are_asked_for_what_they_know(
    version: int, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "survey_walls", lambda: Walls(version, True))
    monkeypatch.setattr(confinement, "survey_walls", lambda: Walls(version, True))
    for name in ("read outside", "write outside", "truncate outside", "connect", "kill its parent"):
        body = ATTACKS[name].format(outside=outside, port=9)
        assert report(SandboxConfig(), body).startswith("held: ")
    assert (outside / "secret").read_text() == SECRET
