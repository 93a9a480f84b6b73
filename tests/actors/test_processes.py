"""What a process is at is heard from one that is stuck, and from one that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from actors.processes import Process, read_stacks_here
from raylign.training.heartbeat import read_birth

ROOT = Path(__file__).resolve().parents[2]
STUCK = """
import time
from actors.processes import record_stacks

def get_nowhere():
    time.sleep(60)

print(record_stacks(), flush=True)
get_nowhere()
"""


def test_a_stuck_process_says_where_it_is_stopped_or_not_and_a_dead_one_nothing() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        try:
            assert child.stdout is not None
            stacks = int(child.stdout.readline())
            process = Process(child.pid, read_birth(child.pid), "", stacks)
            time.sleep(0.1)
            assert "in get_nowhere" in read_stacks_here(process)
            os.kill(child.pid, signal.SIGSTOP)
            assert read_stacks_here(process).count("in get_nowhere") == 2  # the first one too
        finally:
            child.kill()
            child.wait()
    assert read_stacks_here(process) == ""
