"""Gathering and sending at the same time: nothing is lost, and whoever fails is heard."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from raylign.training.publication import Named, send_beside


def make_buckets(count: int) -> Iterator[list[Named]]:
    for number in range(count):
        yield [(f"{number}.{side}", torch.full((2,), float(number))) for side in "ab"]


def test_everything_arrives_in_order_from_another_thread() -> None:
    threads = []

    def send(tensors: Iterator[Named]) -> list[str]:
        threads.append(threading.current_thread())
        return [name for name, _ in tensors]

    expected = [f"{number}.{side}" for number in range(9) for side in "ab"]
    assert send_beside(make_buckets(9), send) == expected
    assert threads != [threading.current_thread()]


def test_a_bucket_is_gathered_while_the_one_before_is_sent() -> None:
    """Neither side could end if the other had to end first."""
    second_made, first_sent = threading.Event(), threading.Event()

    def make() -> Iterator[list[Named]]:
        yield [("first", torch.zeros(1))]
        second_made.set()
        yield [("second", torch.zeros(1))]
        assert first_sent.wait(10)
        yield [("third", torch.zeros(1))]

    def send(tensors: Iterator[Named]) -> int:
        next(tensors)
        assert second_made.wait(10)
        first_sent.set()
        return 1 + sum(1 for _ in tensors)

    assert send_beside(make(), send) == 3


def test_a_sender_that_fails_does_not_stop_the_gathering() -> None:
    """Other ranks gather, too, and would wait for this one."""
    made = []

    def make() -> Iterator[list[Named]]:
        for bucket in make_buckets(20):
            made.append(bucket)
            yield bucket

    def send(tensors: Iterator[Named]) -> None:
        next(tensors)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        send_beside(make(), send)
    assert len(made) == 20


def test_what_could_not_be_gathered_is_not_half_sent() -> None:
    sent: list[str] = []

    def make() -> Iterator[list[Named]]:
        yield from make_buckets(2)
        raise ConnectionError("rank 1 is gone")

    def send(tensors: Iterator[Named]) -> None:
        sent.extend(name for name, _ in tensors)
        sent.append("all of it")

    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        send_beside(make(), send)
    assert "all of it" not in sent
