"""Memory is that of the whole process tree, and the meter remembers its peak."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

from raylign.footprint import MemoryMeter, measure_memory

MIB = 1 << 20
CHILD = "data = bytearray(96 << 20); print('ready', flush=True); input()"


def test_a_child_counts_and_is_remembered() -> None:
    before = measure_memory(psutil.Process())
    with MemoryMeter(every_s=0.05) as meter:
        command = [sys.executable, "-S", "-c", CHILD]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            during = measure_memory(psutil.Process(os.getpid()))
            time.sleep(0.3)
            child.communicate("\n")
        after = measure_memory(psutil.Process())
    assert during - before > 90 * MIB
    assert during - after > 90 * MIB
    assert meter.peak >= during - 30 * MIB
