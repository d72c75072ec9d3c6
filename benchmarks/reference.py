"""The check that every provider passes before it is timed: one step against the formula in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ops import DECAYS, LR, MAX_NORM, MOMENTUM, WEIGHT_DECAY
from .providers import Step

# Elements compared per tensor, spread over its length.
SAMPLES = 4096

# Each result takes at most four roundings (torch's separate operations round in between), each of
# which errs by at most half an epsilon of the terms' magnitudes, or of the smallest normal number.
ROUNDINGS = 4

# Of a norm. torch's on the CPU sums 39 million squares of GPT-2's embedding in a few dozen lanes of
# float32 and ends 9e-4 below the exact norm; in half types the norm itself is rounded to them.
NORM_ERROR = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


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


def check(
    what: str,
    actual: list[Tensor],
    terms: list[Tensor],
    roundings: int = ROUNDINGS,
    scaled: Tensor | float = 0.0,
) -> None:
    """Raises unless the tensors equal the sum of the terms, to the rounding of their dtype.

    Args:
        what: The tensors' name.
        actual: The tensors.
        terms: The terms of the formula in fp64.
        roundings: How many roundings of the terms are allowed.
        scaled: What is multiplied by a factor that may be one minus a number rounded to the dtype.
    """
    limits = torch.finfo(actual[0].dtype)
    magnitude = sum(term.abs() for term in terms) + limits.smallest_normal
    error = (samples(actual) - sum(terms)).abs()
    excess = error / (limits.eps / 2 * (roundings * magnitude + scaled))
    wrong = ~(excess <= 1)  # NaN counts as wrong
    if wrong.any():
        raise WrongResultError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} compared elements are wrong, "
            f"the worst by {excess.max():.3g} times the tolerance"
        )


def check_clip(step: Step, exact: float) -> float:
    """Compares the norm of the last step with the exact one, and returns its coefficient."""
    if step.grad_norm is None:
        return 1.0
    norm = float(step.grad_norm())
    if not abs(norm - exact) <= NORM_ERROR[step.grads[0].dtype] * exact:
        raise WrongResultError(f"norm: {norm} is not {exact}")
    if any(grad.any() for grad in step.grads):
        raise WrongResultError("reset: a gradient is not 0 after the step")
    return min(1.0, MAX_NORM / (norm + 1e-6))


def check_step(step: Step, renew: Callable[[], None]) -> None:
    """Runs two steps and compares the second, which has momentum, with the formula in fp64.

    Args:
        step: The step.
        renew: Puts the gradients back where a step has changed them.

    Raises:
        WrongResultError: A parameter, momentum buffer, shadow, norm or gradient is wrong.
    """
    step.run()
    renew()
    for shadows in step.averages:  # far from their parameters, so that a wrong weight is seen
        torch._foreach_mul_(shadows, 0.5)
    before = [samples(shadows) for shadows in step.averages]
    if step.momentum is None:
        step.run()
    else:
        check_sgd(step, step.momentum())

    # Shadows follow the parameters as stored, or their masters.
    weights = samples(step.masters() if step.masters else step.params)
    for k, (shadows, s) in enumerate(zip(step.averages, before, strict=True)):
        difference = weights - s
        check(f"shadow {k}", shadows, [s, (1 - DECAYS[k]) * difference], scaled=difference.abs())
    renew()


def check_sgd(step: Step, momentum: list[Tensor]) -> None:
    """Runs a step and compares all but its averages with the formula."""
    weights = step.masters() if step.masters else step.params
    p, g, v = samples(weights), samples(step.grads), samples(momentum)
    exact = 0.0
    if step.grad_norm:
        exact = sum(float(grad.double().square().sum()) for grad in step.grads) ** 0.5
    step.run()

    g = g * check_clip(step, exact)
    roundings = ROUNDINGS + (2 if step.grad_norm else 0)  # of the coefficient and its product
    direction = [MOMENTUM * v, g, WEIGHT_DECAY * p]
    check("momentum", momentum, direction, roundings)
    check("parameter", weights, [p, *(-LR * term for term in direction)], roundings)
    if step.masters:
        check("rounding", step.params, [samples(weights)], 1)
