"""Counts of steps, part of which only a device knows to have been taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class Counter:
    """Counts on the host and, where a step is replayed or may be skipped there, on the device.

    The kernel that runs before a step on a device advances the counter that :meth:`counted_on`
    returns. CUDA graphs have captured its address, and the part of the host as a number: from then
    on that part stays as it is, and everything is counted on the device.

    Whoever owns a counter saves and copies it as an int.
    """

    def __init__(self, name: str, value: int = 0) -> None:
        self._name = name
        self._host = value
        self._on: dict[torch.device, Tensor] = {}
        self._counting: Tensor | None = None  # which of them counts

    def __int__(self) -> int:
        """The count; waits for a GPU that has a part in it."""
        return self._host + (0 if self._counting is None else int(self._counting))

    @property
    def on_host(self) -> int:
        """The part of the count that is known without waiting for a GPU."""
        return self._host if self._counting is None or self._counting.is_cuda else int(self)

    @property
    def on_gpu(self) -> Tensor | None:
        """The other part, if there is a GPU that counts, or has been told that it may have to."""
        found = (self._counting, *self._on.values())
        return next((count for count in found if count is not None and count.is_cuda), None)

    @property
    def counts_on(self) -> torch.device | None:
        """The device that has begun to count."""
        return None if self._counting is None else self._counting.device

    def set(self, value: int) -> None:
        """Starts over from a count, and so do the graphs that were captured."""
        if self._counting is None:
            self._host = value
        else:
            self._counting.fill_(value - self._host)

    def next(self) -> Callable[[], object]:
        """What counts a step that the host knows to be taken: once, however often it is called."""
        if self._counting is None:
            return partial(setattr, self, "_host", self._host + 1)
        return partial(self._counting.copy_, self._counting + 1)

    def move_to(self, home: torch.device | None) -> None:
        """Takes back what another device has counted, where steps are now counted on this one.

        Waits for that device.
        """
        if self._counting is not None and self._counting.device != home:
            self._host += int(self._counting)
            self._counting.zero_()
            self._counting = None

    def held(self, device: torch.device | None) -> Tensor | None:
        """What :meth:`on` returns, if it is there."""
        return None if device is None else self._on.get(device)

    def on(self, device: torch.device) -> Tensor:
        """An int64 tensor on the device, whose value is added to the count.

        Raises:
            RuntimeError: there is none yet, and a CUDA graph is being captured: what sets it to 0
                would be captured too.
        """
        count = self._on.get(device)
        if count is None:
            if is_capturing(device):
                raise RuntimeError(
                    f"{self._name}: expected its counter on {device} to exist before a CUDA graph "
                    "is captured; use SGD(capturable=True), or take a step before the capture"
                )
            count = self._on[device] = torch.zeros((), dtype=torch.int64, device=device)
        return count

    def counted_on(self, device: torch.device) -> Tensor:
        """The same, for the device to count a step, and from this one on all."""
        self.move_to(device)
        self._counting = self.on(device)
        return self._counting


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched there now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
