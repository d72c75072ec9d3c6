"""What a step does to shadows, as an EMA tells the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from fused_opt.schedules import Schedule

#: The shadow of a tensor; where there are several averages, that of each.
Shadow = Tensor | tuple[Tensor, ...]


class Averages(NamedTuple):
    """What one step does to shadows.

    A step t is due if t mod ``every`` is 0. Where t < ``after``, shadows then copy their tensors;
    later each average has its decay, and a schedule is evaluated at the number of those steps
    before, k = ceil(t / every) - ceil(after / every). ``csrc/rules/average.h`` has the same.
    """

    shadows: dict[Tensor, Shadow]  # of each tracked tensor
    decays: tuple[float | Tensor | Schedule, ...]  # one per average; schedules run natively
    steps: int = 0  # t of this step as the host knows it ...
    on_device: Tensor | None = None  # ... plus this int64 count, where only a device knows it
    every: int = 1
    after: int = 0
    frozen: frozenset[Tensor] = frozenset()  # of these, all that require no gradient are copied

    def copies(self, tensor: Tensor) -> bool:
        """Whether its shadows copy it rather than average it."""
        return not tensor.requires_grad and tensor in self.frozen

    def on_host(self) -> list[float] | None:
        """The decays of this step as numbers, None if it is not due; waits for the device."""
        t = self.steps + (0 if self.on_device is None else int(self.on_device))
        if t % self.every != 0:
            return None
        if t < self.after:
            return [0.0] * len(self.decays)
        k = t // self.every - -(-self.after // self.every)
        return [
            float(decay) if isinstance(decay, (float, int, Tensor)) else decay(k)
            for decay in self.decays
        ]


def all_shadows(shadow: Shadow) -> tuple[Tensor, ...]:
    """The shadows of a tensor in all averages."""
    return shadow if isinstance(shadow, tuple) else (shadow,)


def is_frozen(tensor: Tensor) -> bool:
    """Whether it is a parameter that does not require a gradient."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
