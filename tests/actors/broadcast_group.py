"""A learner and readers of its broadcasts, some of which die or stop in the middle: run as a
script, it prints what each saw as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from typing import Any

import torch

from actors.broadcast import Broadcast
from actors.weights import Canary, WeightManifest, publish_weights, receive_weights
from raylign.training.buckets import SyncError

NAMES = ("a", "b", "c", "d")
DEADLINE_S = 4.0
COUNT = 12  # of tensors, a bucket each, more in all than sockets hold


def read(inbox: Any, outbox: Any, name: str) -> None:
    """A worker: takes manifests until None; `fate` is a signal to itself in the middle of one."""
    while (order := inbox.get()) is not None:
        manifest, fate = order
        start, seen = time.monotonic(), 0.0
        try:
            for place, (_, tensor) in enumerate(receive_weights(manifest, name)):
                seen += float(tensor.double().sum())
                if fate is not None and place == 1:
                    os.kill(os.getpid(), fate)
            said: Any = seen
        except SyncError as error:
            said = str(error)
        outbox.put((name, manifest.version, said, time.monotonic() - start))


class Group:
    """The learner and its readers."""

    def __init__(self) -> None:
        forked = multiprocessing.get_context("fork")  # before any thread is started
        self.outbox = forked.Queue()
        self.inboxes = {name: forked.Queue() for name in NAMES}
        self.readers = {
            name: forked.Process(target=read, args=(inbox, self.outbox, name), daemon=True)
            for name, inbox in self.inboxes.items()
        }
        for reader in self.readers.values():
            reader.start()
        self.learner = Broadcast(deadline_s=DEADLINE_S)

    def publish(self, version: int) -> WeightManifest:
        weights = {f"t{i}": torch.full((1 << 20,), float(version + i)) for i in range(COUNT)}
        return publish_weights(version, weights, Canary((), ()), self.learner, limit=4 << 20)

    def sync(
        self, manifest: WeightManifest, names: str, fates: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """What those readers say that are not to die or stop."""
        fates = fates or {}
        for name in names:
            self.inboxes[name].put((manifest, fates.get(name)))
        said = (self.outbox.get(timeout=20) for name in names if name not in fates)
        return {name: [version, seen, seconds] for name, version, seen, seconds in said}


def main() -> None:
    torch.set_num_threads(1)
    group = Group()
    found: dict[str, Any] = {}
    found["first"] = group.sync(group.publish(0), "abc")
    group.sync(group.publish(1), "abc")
    found["groups"] = group.learner._generation
    found["stopped"] = group.sync(group.publish(2), "abc", {"b": signal.SIGSTOP})
    os.kill(group.readers["b"].pid or 0, signal.SIGCONT)
    name, version, seen, seconds = group.outbox.get(timeout=20)
    found["resumed"] = {name: [version, seen, seconds]}
    manifest = group.publish(3)
    found["again"] = group.sync(manifest, "abc")
    found["killed"] = group.sync(group.publish(4), "abc", {"c": signal.SIGKILL})
    found["older"] = group.sync(manifest, "d")  # it and the current one are held
    manifest = group.publish(5)
    found["newcomer"] = group.sync(manifest, "d")
    group.publish(6)
    group.publish(7)
    found["gone version"] = group.sync(manifest, "a")
    found["lost"] = [
        [loss.worker, loss.version, loss.reason] for loss in group.learner.take_losses()
    ]
    assert not group.learner.take_losses(), "each is told once"
    manifest = group.publish(8)
    group.learner.close()
    found["gone learner"] = group.sync(manifest, "ad")
    for inbox in group.inboxes.values():
        inbox.put(None)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
