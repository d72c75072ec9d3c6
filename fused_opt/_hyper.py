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

#: What of a param group may be a tensor of one element, in the order of ``Scalar`` in csrc.
SCALARS = ("lr", "momentum", "dampening", "weight_decay", "grad_scale", "clip")

#: What a param group has beyond torch's options, and what it is where nothing is said.
OWN_OPTIONS = {
    "formulation": "torch",
    "decoupled_weight_decay": False,
    "reset_grads": False,
    "state_dtype": None,
    "master_weights": None,
    "stochastic_rounding": False,
    "rounding_seed": 0,
    "rounding_steps": 0,
    "max_grad_norm": None,
    "capturable": False,
}

HALF_DTYPES = (torch.bfloat16, torch.float16)

#: The dtypes of what is kept there.
REFINEMENT_DTYPES = {
    "master": (torch.float32,),
    "residual": (torch.int16,),
    "compensation": HALF_DTYPES,
}
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


def check_uint64(value: Any, name: str) -> None:
    """Raises ValueError unless it is an integer of 64 bits without a sign."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"Invalid {name}: {value!r}, expected an integer in [0, 2**64)")


def check_decay(decay: Any, name: str = "decay") -> None:
    """Raises ValueError unless it is a number in [0, 1], or a tensor of one on a GPU."""
    number = visible(decay, name)
    if not (is_hidden(decay) or (_is_number(number) and 0.0 <= number <= 1.0)):
        raise ValueError(f"Invalid {name}: {decay!r}, expected a number in [0, 1]")


def check_max_grad_norm(max_grad_norm: Any) -> None:
    """Raises ValueError unless it is a positive number, or None for no clipping."""
    if max_grad_norm is None:
        return
    number = visible(max_grad_norm, "max_grad_norm")
    if not (is_hidden(max_grad_norm) or (_is_number(number) and number > 0)):  # NaN compares false
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r}, expected None or a number above 0"
        )


def check_capturable(group: dict[str, Any]) -> None:
    """Raises ValueError unless a captured step of the group can be replayed from the first on."""
    capturable, dampening = group["capturable"], group["dampening"]
    if not isinstance(capturable, bool):
        raise ValueError(f"Invalid capturable: {capturable!r}, expected True or False")
    if capturable and group["differentiable"]:
        raise ValueError("capturable would make the first momentum, which differentiable needs")
    if capturable and visible(dampening, "dampening") != 0:
        raise ValueError(
            f"capturable: expected dampening 0, got {dampening}: a parameter's first step is not "
            "dampened, and a replayed one cannot differ"
        )


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError unless a param group's own options are what they may be."""
    check_formulation(group["formulation"])
    check_state_dtype(group["state_dtype"])
    check_master_weights(group["master_weights"])
    check_uint64(group["rounding_seed"], "rounding_seed")
    check_uint64(group["rounding_steps"], "rounding_steps")
    check_capturable(group)


def common_max_grad_norm(groups: list[dict[str, Any]]) -> float | Tensor | None:
    """Returns what all groups say; raises ValueError unless they agree, since there is one norm."""
    found: list[float | Tensor | None] = [group["max_grad_norm"] for group in groups]
    for max_norm in found:
        check_max_grad_norm(max_norm)
        if not _is_same(max_norm, found[0]):
            raise ValueError(
                "max_grad_norm: one norm is taken over all param groups; expected the same value "
                f"in each, got {found}"
            )
    return found[0] if found else None


def _is_same(one: float | Tensor | None, other: float | Tensor | None) -> bool:
    """Tensors may change: they are the same only if they are one."""
    if one is other or isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return one == other


def as_scalar(value: float | Tensor, name: str) -> float | Tensor:
    """A hyper-parameter that broadcasts over parameters of any shape, also of none."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"Tensor {name} must be a real number, got {value.dtype}")
    return value.reshape(())


def is_hidden(value: Any) -> bool:
    """Whether to look at a hyper-parameter would wait for a GPU, or break a graph being traced."""
    return isinstance(value, Tensor) and (value.is_cuda or torch.compiler.is_compiling())


def visible(value: Any, name: str) -> Any:
    """A hyper-parameter as the number that a tensor holds; None if it is hidden."""
    scalar = as_scalar(value, name)
    if not isinstance(scalar, Tensor):
        return scalar
    return None if is_hidden(scalar) else scalar.item()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class SgdHyper(NamedTuple):
    """What one param group is stepped with. Numbers may be one-element tensors.

    Those come first, in the order of :data:`SCALARS`.
    """

    lr: float | Tensor
    momentum: float | Tensor = 0.0
    dampening: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    grad_scale: float | Tensor = 1.0
    nesterov: bool = False
    maximize: bool = False
    formulation: str = "torch"
    decoupled_weight_decay: bool = False
    reset_grads: bool = False
    state_dtype: torch.dtype | None = None
    master_weights: str | None = None
    clip: Tensor | None = None  # multiplies the gradients; the kernels get it by another way

    @classmethod
    def of_group(cls, group: dict[str, Any], grad_scale: float | Tensor = 1.0) -> SgdHyper:
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

    def has_momentum(self) -> bool:
        """Whether there is any; with a tensor always, which may hold another number later.

        No property: torch 2.10 cannot trace those of a tuple.
        """
        return isinstance(self.momentum, Tensor) or bool(self.momentum != 0)

    @property
    def state_key(self) -> str | None:
        """Where the state keeps the momentum; None if there is none."""
        return STATE_KEY[self.formulation] if self.has_momentum() else None

    @property
    def may_dampen(self) -> bool:
        """Whether the first step of a parameter differs from those after it."""
        return bool(visible(self.dampening, "dampening") != 0)

    def numbers(self) -> SgdHyper:
        """The same without tensors; waits for the GPU where one is there.

        But for the momentum, which as a tensor is kept when it is 0: that comes to the CPU.
        """
        momentum = as_scalar(self.momentum, "momentum")
        return self._replace(
            lr=float(self.lr),
            momentum=momentum.cpu() if isinstance(momentum, Tensor) else momentum,
            dampening=float(self.dampening),
            weight_decay=float(self.weight_decay),
            grad_scale=float(self.grad_scale),
        )

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

    max_norm: float | Tensor
    grad_scale: float | Tensor = 1.0
    infinity: bool = False

    @property
    def order(self) -> float:
        """The norm's p."""
        return float("inf") if self.infinity else 2.0
