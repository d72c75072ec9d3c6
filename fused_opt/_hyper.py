"""The hyper-parameters of momentum SGD, checked once for every way to call it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Formulation = Literal["torch", "sutskever"]
FORMULATIONS: tuple[str, ...] = get_args(Formulation)

#: Where an optimizer's state keeps the momentum. The two hold different quantities, v and -lr v,
#: and so have different names: neither can be taken for the other.
STATE_KEY = {"torch": "momentum_buffer", "sutskever": "velocity"}

#: Where it keeps what refines a half-precision parameter, by the value of ``master_weights``.
REFINEMENT_KEY = {"fp32": "master", "split": "residual", "kahan": "compensation"}

HALF_DTYPES = (torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_formulation(formulation: Any) -> None:
    """Raises ValueError unless it is one of :data:`FORMULATIONS`."""
    if formulation not in FORMULATIONS:
        raise ValueError(f"Invalid formulation: {formulation!r}, expected one of {FORMULATIONS}")


def check_state_dtype(state_dtype: Any) -> None:
    """Raises ValueError unless momentum can be stored in it; None stands for the parameter's."""
    if state_dtype is not None and state_dtype not in STATE_DTYPES:
        names = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"Invalid state_dtype: {state_dtype!r}, expected None or one of {names}")


def check_master_weights(master_weights: Any) -> None:
    """Raises ValueError unless it is None or a key of :data:`REFINEMENT_KEY`."""
    if master_weights is not None and master_weights not in REFINEMENT_KEY:
        names = ", ".join(map(repr, REFINEMENT_KEY))
        raise ValueError(f"Invalid master_weights: {master_weights!r}, expected None or {names}")


def check_decay(decay: Any) -> None:
    """Raises ValueError unless it is a number in [0, 1]."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay: {decay!r}, expected a number in [0, 1]")


def check_max_grad_norm(max_grad_norm: Any) -> None:
    """Raises ValueError unless it is a positive number, or None for no clipping."""
    if max_grad_norm is None:
        return
    is_number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if not (is_number and max_grad_norm > 0):  # NaN compares false
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r}, expected None or a number above 0"
        )


def as_scalar(value: float | Tensor, name: str) -> float | Tensor:
    """A hyper-parameter that broadcasts over parameters of any shape, also of none."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    return value.reshape(())


class SgdHyper(NamedTuple):
    """What one param group is stepped with. Numbers may be one-element tensors."""

    lr: float | Tensor
    momentum: float | Tensor = 0.0
    dampening: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    grad_scale: float = 1.0
    nesterov: bool = False
    maximize: bool = False
    formulation: str = "torch"
    decoupled_weight_decay: bool = False
    reset_grads: bool = False
    state_dtype: torch.dtype | None = None
    master_weights: str | None = None
    clip: Tensor | None = None  # multiplies the gradients; the kernels get it by another way

    @classmethod
    def of_group(cls, group: dict[str, Any], grad_scale: float = 1.0) -> SgdHyper:
        """Reads an entry of ``param_groups``, which users change between steps."""
        check_formulation(group["formulation"])
        check_state_dtype(group["state_dtype"])
        check_master_weights(group["master_weights"])
        return cls(
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            formulation=group["formulation"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            reset_grads=group["reset_grads"],
            state_dtype=group["state_dtype"],
            master_weights=group["master_weights"],
        )

    @property
    def state_key(self) -> str | None:
        """Where the state keeps the momentum; None if there is none."""
        return STATE_KEY[self.formulation] if self.momentum != 0 else None

    @property
    def refinement_key(self) -> str | None:
        """Where the state keeps what refines half-precision parameters; None if nothing does."""
        return None if self.master_weights is None else REFINEMENT_KEY[self.master_weights]

    def momentum_dtype(self, param: Tensor) -> torch.dtype:
        """The dtype of a parameter's momentum: beside a master, the master's."""
        if self.state_dtype is not None:
            return self.state_dtype
        has_master = self.master_weights in ("fp32", "split") and param.dtype in HALF_DTYPES
        return torch.float32 if has_master else param.dtype


class ClipHyper(NamedTuple):
    """How gradients are clipped: by the 2-norm of all, or by their largest magnitude."""

    max_norm: float
    grad_scale: float = 1.0
    infinity: bool = False

    @property
    def order(self) -> float:
        """The norm's p."""
        return float("inf") if self.infinity else 2.0
