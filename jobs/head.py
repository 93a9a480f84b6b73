"""Ends a job in one line once Ray's head is gone for good.

Ray ends such a process, too, in the middle of whatever it does and with lines of its own. So this
looks a little sooner, and says what the user can do. Nothing is lost by ending at once: stages and
checkpoints are written so that a kill at any moment leaves them whole.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress

import psutil

from raylign.runtime import is_connected, is_private

_PATIENCE = 0.75
"""Share of the time that Ray itself waits."""
_RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAY_WAITS_S = 60.0
_STATUS = 2  # what a user can put right
_PINGS = 30
"""How often the head is called in the time that it is waited for."""


def watch_head(patience_s: float | None = None) -> None:
    """End this process when the head it has joined has not answered for `patience_s` seconds; a
    little less than Ray's own patience when not given. Once for each process."""
    import ray  # here, so that what needs no cluster does not wait for it

    global _watched
    address = str(ray.get_runtime_context().gcs_address)
    if _watched == address:
        return
    _watched = address
    if patience_s is None:
        patience_s = _PATIENCE * float(os.environ.get(_RAY_WAITS, _RAY_WAITS_S))
    thread = threading.Thread(target=_watch, args=(address, patience_s), name="head", daemon=True)
    thread.start()


def _watch(address: str, patience_s: float) -> None:
    global _watched
    pause = patience_s / _PINGS
    answered, missed = time.monotonic(), 0
    while _watched == address and is_connected():
        if _answers(address, pause):
            answered, missed = time.monotonic(), 0
        else:
            missed += 1
        silent = time.monotonic() - answered
        if silent > patience_s and missed > _PINGS // 2:  # and it was not we who were stopped
            _end(address, silent)
        time.sleep(pause)
    if _watched == address:
        _watched = ""


def _answers(address: str, timeout_s: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def _end(address: str, silent: float) -> None:
    shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a live panel has hidden the cursor
    sys.stderr.write(
        f"{shown}error: Ray's head at {address} has not answered for {silent:.0f} s; what was done "
        "is on disk: once there is a cluster again, the same command goes on\n"
    )
    sys.stderr.flush()
    if is_private():  # its processes would wait for the head for as long again
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
    os._exit(_STATUS)  # anything gentler would ask the head


_watched = ""
