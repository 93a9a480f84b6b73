"""Work handed to a thread of its own by those who must not wait for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class Outbox:
    """Work that is done in order on a thread of its own; whoever hands it in never waits."""

    def __init__(self, name: str, capacity: int, fail: Callable[[Exception], None]) -> None:
        """capacity: of the weights of work that waits; what comes on top is not done, and counted
        in `lost`. `fail` hears, on that thread, of work that raised."""
        self._work: deque[tuple[Callable[[], None], int]] = deque()
        self._capacity, self._fail = capacity, fail
        self._changed = threading.Condition()
        self._waiting, self._since, self._closed = 0, 0.0, False
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None], weight: int = 1, needed: bool = False) -> bool:
        """Hand in work; False when there was no room. What is `needed` always finds room."""
        with self._changed:
            full = self._waiting and self._waiting + weight > self._capacity
            if self._closed or (full and not needed):
                self.lost += weight
                return False
            self._work.append((work, weight))
            self._waiting += weight
            self._changed.notify()
            return True

    @property
    def stuck_seconds(self) -> float:
        """How long the present piece of work has taken so far."""
        since = self._since
        return time.monotonic() - since if since else 0.0

    def clear(self) -> None:
        """Forget work that has not begun."""
        with self._changed:
            self._work.clear()
            self._waiting = 0

    def close(self, timeout_s: float) -> bool:
        """Take no more, and wait for what is there; False when it was not done in time."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._work and not self._closed:
                    self._changed.wait()
                if not self._work:
                    return
                work, weight = self._work.popleft()
                self._since = time.monotonic()
            try:
                work()
            except Exception as error:
                self._fail(error)
            with self._changed:
                self._since = 0.0
                self._waiting = max(0, self._waiting - weight)
