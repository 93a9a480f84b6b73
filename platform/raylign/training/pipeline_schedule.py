"""In which order a stage computes micro-batches, and what it tells its neighbours.

One forward, one backward (PipeDream-Flush; Narayanan et al., 2021, section 2.2): a stage runs ahead
by as many micro-batches as stages follow it, so at most that many activations are alive, and with
S stages and M micro-batches it is idle for (S - 1) / (M + S - 1) of the time, as in GPipe.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from raylign.training.pipeline_link import Link, Shape


def run_forward_backward(
    link: Link,
    shapes: list[Shape],
    forward: Callable[[int, torch.Tensor | None], torch.Tensor | None],
    backward: Callable[[int, torch.Tensor | None], torch.Tensor | None],
) -> None:
    """All micro-batches forth and back; collective over the stages.

    shapes: of each micro-batch's hidden states, the same on every stage. `forward(i, hidden)` gets
    what the stage before made of micro-batch i (None on the first) and returns what the next one
    needs (None on the last); `backward(i, gradient)` the same the other way round.
    """
    count = len(shapes)
    ahead = min(link.stages - link.stage - 1, count)
    for index in range(ahead):
        received, _ = link.exchange(from_previous=shapes[index])
        link.exchange(to_next=forward(index, received))
    if ahead < count:
        received, _ = link.exchange(from_previous=shapes[ahead])
    for index in range(ahead, count):
        made = forward(index, received)
        oldest = index - ahead
        _, gradient = link.exchange(to_next=made, from_next=shapes[oldest])
        following = shapes[index + 1] if index + 1 < count else None
        received, _ = link.exchange(to_previous=backward(oldest, gradient), from_previous=following)
    for index in range(count - ahead, count):
        _, gradient = link.exchange(from_next=shapes[index])
        link.exchange(to_previous=backward(index, gradient))
