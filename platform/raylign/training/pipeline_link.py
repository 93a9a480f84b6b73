"""Hidden states and gradients between neighbouring stages: the only place where a stage waits."""

from __future__ import annotations

import torch
import torch.distributed as dist

Shape = tuple[int, ...]


class Link:
    """To the stages before and after this one; tensors travel in one type, on one device."""

    def __init__(
        self,
        ranks: tuple[int, ...],
        stage: int,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`ranks` of the stages, in order; `group` is theirs."""
        self.stage, self.stages = stage, len(ranks)
        self._group, self._dtype, self._device = group, dtype, device
        self._previous = ranks[stage - 1] if stage > 0 else None
        self._next = ranks[stage + 1] if stage + 1 < len(ranks) else None

    def exchange(
        self,
        *,
        to_previous: torch.Tensor | None = None,
        from_previous: Shape | None = None,
        to_next: torch.Tensor | None = None,
        from_next: Shape | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Send and receive what is given; (from previous, from next), None where nothing came.

        What would go to or come from beyond an end is left out. All of it is one operation: two
        neighbours that send to each other at the same time would otherwise, with NCCL, wait for
        each other for ever.
        """
        operations = []
        before = after = None
        if self._previous is not None:
            if to_previous is not None:
                operations.append(self._send(to_previous, self._previous))
            if from_previous is not None:
                before = torch.empty(from_previous, dtype=self._dtype, device=self._device)
                operations.append(dist.P2POp(dist.irecv, before, self._previous, self._group))
        if self._next is not None:
            if to_next is not None:
                operations.append(self._send(to_next, self._next))
            if from_next is not None:
                after = torch.empty(from_next, dtype=self._dtype, device=self._device)
                operations.append(dist.P2POp(dist.irecv, after, self._next, self._group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return before, after

    def _send(self, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        assert tensor.dtype == self._dtype, f"a stage made {tensor.dtype}, not {self._dtype}"
        return dist.P2POp(dist.isend, tensor.detach().contiguous(), peer, self._group)
