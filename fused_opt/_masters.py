"""Refinements of half-precision parameters from plain torch operations.

What ``csrc/rules/master.h`` does in the kernels: for the first step, for what the kernels do not
reach, and for changes of a parameter from outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_opt._hyper import HALF_DTYPES


def exact_value(param: Tensor, refinement: Tensor) -> Tensor:
    """Returns the float32 value that the two stand for; the master itself where it is whole."""
    if refinement.dtype == torch.float32:
        return refinement
    if refinement.dtype == torch.int16:
        upper = param.detach().view(torch.int16).to(torch.int32) << 16
        return (upper + refinement.to(torch.int32)).view(torch.float32)
    return param.detach().float() + refinement.float()


def store_(exact: Tensor, param: Tensor, refinement: Tensor) -> None:
    """Sets both to a float32 value."""
    if refinement.dtype == param.dtype:
        param.copy_(exact)
        lost = exact - param.float()
        refinement.copy_(torch.where(lost.isfinite(), lost, 0.0))
        return
    if param.dtype != torch.bfloat16:
        param.copy_(exact)
        refinement.copy_(exact)
        return
    # Ties away from zero, which the residual can undo; NaN payloads could carry into the sign.
    bits = exact.contiguous().view(torch.int32)
    quiet = (bits & -0x80000000) | 0x7FC00000
    bits = torch.where(exact.isnan(), quiet, bits)
    param.copy_(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16))
    if refinement.dtype == torch.int16:
        refinement.copy_(bits.to(torch.int16))
    else:
        refinement.copy_(bits.view(torch.float32))


def fits(param: Tensor, refinement: Tensor) -> bool:
    """Whether it can refine the parameter, which may have been converted since it was made."""
    if refinement.dtype == torch.int16:
        return param.dtype == torch.bfloat16
    return param.dtype in HALF_DTYPES and refinement.dtype in (torch.float32, param.dtype)


def check_refinable(param: Tensor, master_weights: str) -> None:
    """Raises ValueError for ``"split"`` with another dtype than bfloat16, which it splits into."""
    if master_weights == "split" and param.dtype != torch.bfloat16:
        raise ValueError(
            f"expected a bfloat16 parameter with master_weights='split', got {param.dtype}; "
            "'fp32' and 'kahan' take float16 too"
        )


def new_refinement(param: Tensor, master_weights: str) -> Tensor:
    """Returns what refines a parameter that is exact as it stands.

    Raises:
        ValueError: see :func:`check_refinable`.
    """
    check_refinable(param, master_weights)
    if master_weights == "fp32":
        return param.detach().float()
    if master_weights == "kahan":
        return torch.zeros_like(param, requires_grad=False)
    return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)


def converted_refinement(param: Tensor, held: Tensor, master_weights: str) -> Tensor:
    """Returns the refinement in another form: a master as its residual, or the other way round.

    Raises:
        ValueError: from or to a compensation, which is rounded.
    """
    whole, half = held.dtype == torch.float32, held.dtype == torch.int16
    if master_weights == "fp32" and half:
        return exact_value(param, held)
    if master_weights == "split" and whole and param.dtype == torch.bfloat16:
        refinement = new_refinement(param, master_weights)
        store_(held, param.detach().clone(), refinement)
        return refinement
    raise ValueError(
        f"expected the state of master_weights={master_weights!r}, got a {held.dtype} refinement "
        "of another mode, which cannot be converted exactly; delete it from the optimizer's state "
        "to go on from the parameter as it is"
    )
