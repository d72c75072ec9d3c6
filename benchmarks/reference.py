"""The check that every provider passes before it is timed: one step against the formula in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .providers import DECAY, LR, MOMENTUM, WEIGHT_DECAY, Step

# Elements compared per tensor, spread over its length.
SAMPLES = 4096

# Each result takes at most four roundings (torch's separate operations round in between), each of
# which errs by at most half an epsilon of the terms' magnitudes, or of the smallest normal number.
ROUNDINGS = 4


class WrongResultError(RuntimeError):
    """A provider's step does not give the result of the formula."""


def sample(tensor: Tensor) -> Tensor:
    """Returns elements of all parts of a tensor, its tail included, in fp64 on the CPU."""
    flat = tensor.detach().flatten()
    stride = max(1, flat.numel() // SAMPLES) | 1  # odd, so that every vector lane is visited
    return torch.cat((flat[::stride], flat[-64:])).double().cpu()


def samples(tensors: list[Tensor]) -> Tensor:
    """Returns the samples of all tensors of a list, end to end."""
    return torch.cat([sample(tensor) for tensor in tensors])


def check(what: str, actual: list[Tensor], terms: list[Tensor]) -> None:
    """Raises unless the tensors equal the sum of the terms, to the rounding of their dtype."""
    limits = torch.finfo(actual[0].dtype)
    magnitude = sum(term.abs() for term in terms) + limits.smallest_normal
    error = (samples(actual) - sum(terms)).abs()
    excess = error / (ROUNDINGS * limits.eps / 2 * magnitude)
    wrong = ~(excess <= 1)  # NaN counts as wrong
    if wrong.any():
        raise WrongResultError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} compared elements are wrong, "
            f"the worst by {excess.max():.3g} times the tolerance"
        )


def check_step(step: Step) -> None:
    """Runs two steps and compares the second, which has momentum, with the formula in fp64.

    Raises:
        WrongResultError: A parameter, momentum buffer or shadow is wrong.
    """
    step.run()
    for shadow in step.shadows:  # far from its parameter, so that a wrong weight is seen
        shadow.mul_(0.5)
    p, g, v = samples(step.params), samples(step.grads), samples(step.momentum_buffers)
    s = samples(step.shadows) if step.shadows else None
    step.run()

    direction = [MOMENTUM * v, g, WEIGHT_DECAY * p]
    check("momentum", step.momentum_buffers, direction)
    check("parameter", step.params, [p, *(-LR * term for term in direction)])
    if s is not None:  # the shadow follows the parameter as stored
        check("shadow", step.shadows, [s, (1 - DECAY) * (samples(step.params) - s)])
