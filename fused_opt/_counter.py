"""Counts of steps, part of which only a device knows to have been taken."""

from __future__ import annotations

import torch
from torch import Tensor


class Counter:
    """Counts on the host and, where a step is replayed or may be skipped there, on the device.

    The kernel that runs before a step on a device advances the counter that :meth:`on` returns.
    Whoever owns a counter saves and copies it as an int.
    """

    def __init__(self, name: str, value: int = 0) -> None:
        self._name = name
        self._host = value
        self._on: dict[torch.device, Tensor] = {}

    def __int__(self) -> int:
        """The count; waits for the devices that have a part in it."""
        return self._host + sum(int(count) for count in self._on.values())

    @property
    def on_host(self) -> int:
        """The part of the count that is known without waiting for a GPU."""
        return self._host + sum(int(count) for count in self._on.values() if not count.is_cuda)

    @property
    def on_gpu(self) -> Tensor | None:
        """The other part, if there is one; on the first GPU to be told to count."""
        return next((count for count in self._on.values() if count.is_cuda), None)

    def set(self, value: int) -> None:
        """Starts over from a count."""
        self._host = value
        for count in self._on.values():
            count.zero_()

    def add(self) -> None:
        """Counts a step that the host knows to be taken."""
        self._host += 1

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


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched there now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
