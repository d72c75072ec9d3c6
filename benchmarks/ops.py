"""What is timed: the ops, their hyper-parameters, and the bytes that each must move.

All ops with a step run momentum SGD with weight decay. Averages follow the parameters; an update of
averages alone steps nothing. In the whole tail of a training step gradients are clipped before it
and filled with 0 after it. With masters, half-precision parameters are the rounding of float32
weights that the step updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LR = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
DECAYS = (0.999, 0.99, 0.9)  # of one average after the other
WEIGHTS = tuple(1 - decay for decay in DECAYS)
MAX_NORM = 1.0  # far below the norm of the gradients: all are scaled
WIDE = torch.float32.itemsize  # of shadows and masters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name of a dtype."""
    return next(name for name, each in DTYPES.items() if each == dtype)


@dataclass(frozen=True)
class Op:
    """SGD alone, with the update of EMA shadows, or more than that; or only EMAs."""

    name: str
    averages: int = 0
    sgd: bool = True
    clip: bool = False  # by the norm before the step, and gradients filled with 0 after it
    master: bool = False  # of half-precision parameters: float32, as the momentum beside it

    def suits(self, dtype: torch.dtype) -> bool:
        """Tells whether parameters of that dtype can be updated so."""
        return dtype.itemsize == 2 or not self.master

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes kept per parameter: parameter and momentum, shadows and master (these fp32)."""
        momentum = WIDE if self.master else dtype.itemsize
        return dtype.itemsize + momentum * self.sgd + WIDE * (self.averages + self.master)

    def moved_bytes(self, dtype: torch.dtype) -> int:
        """Bytes per parameter that must move: state both ways, the gradient once.

        Without a step the parameter is only read, and the gradient not at all. Clipping reads the
        gradient once more, since the norm is needed first, and a reset writes it. Beside a master
        the parameter is only written.
        """
        if not self.sgd:
            return 2 * self.state_bytes(dtype) - dtype.itemsize
        param_reads = dtype.itemsize if self.master else 0
        return 2 * self.state_bytes(dtype) + (3 if self.clip else 1) * dtype.itemsize - param_reads

    @property
    def written_streams(self) -> int:
        """Of parameter, momentum and shadows, in full precision; one more is only read."""
        return 2 * self.sgd + self.averages


OPS = {
    op.name: op
    for op in (
        Op("sgd"),
        Op("sgd+ema", averages=1),
        Op("sgd+3ema", averages=3),
        Op("ema", averages=1, sgd=False),
        Op("3ema", averages=3, sgd=False),
        Op("clip+sgd+ema", averages=1, clip=True),
        Op("sgd+ema+master", averages=1, master=True),
    )
}
