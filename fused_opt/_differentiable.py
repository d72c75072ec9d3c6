"""Steps that autograd can look through: out of place, with every hyper-parameter open to it.

``functional.sgd_step`` and ``ema_update`` are :func:`step` and :func:`update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_opt._hyper import HALF_DTYPES, as_scalar, check_decay

Number: TypeAlias = float | Tensor
#: One for all parameters, or one for each.
Hyper: TypeAlias = Number | Sequence[Number]


class SgdHypers(NamedTuple):
    """The hyper-parameters of :func:`step`."""

    lr: Hyper
    momentum: Hyper = 0.0
    weight_decay: Hyper = 0.0
    dampening: Hyper = 0.0


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None] | None,
    hypers: SgdHypers,
    nesterov: bool,
    maximize: bool,
    out: tuple[Sequence[Tensor], Sequence[Tensor | None]] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """``functional.sgd_step``, which documents all but ``out``.

    Args:
        out: tensors to write new parameters and new buffers to, of the same shapes and dtypes,
            which are then returned. They must share no memory with the inputs or each other, and
            autograd must have no part in the step. Entries of parameters without a gradient are
            not looked at; a buffer of None is made anew.
    """
    params, grads = list(params), list(grads)
    count = len(params)
    _check_length("grads", grads, count)
    buffers: list[Tensor | None] = [None] * count
    if momentum_buffers is not None:
        buffers = list(momentum_buffers)
    _check_length("momentum_buffers", buffers, count)
    for name, value in zip(SgdHypers._fields, hypers, strict=True):
        _check_hyper(name, value, count)
    if nesterov:
        _check_nesterov(hypers)

    new_params, new_buffers = params.copy(), buffers.copy()
    active = [i for i, grad in enumerate(grads) if grad is not None]
    rows = [
        _SgdRow(params[i], grad, buffers[i], *(_entry(value, i) for value in hypers))
        for i, grad in enumerate(grads)
        if grad is not None
    ]
    for i, row in zip(active, rows, strict=True):
        _check_row(i, "params", row.param, {"grads": row.grad, "momentum_buffers": row.buffer})
    if out is not None:
        _check_out([tensor for row in rows for tensor in row.tensors()])
    for i, row in zip(active, rows, strict=True):
        new_params[i], new_buffers[i] = _sgd_formula(row, nesterov, maximize)
    if out is not None:
        _write(out[0], new_params, active)
        _write(out[1], new_buffers, active)
    return new_params, new_buffers


def update(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: Hyper,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``functional.ema_update``; ``out`` is as in :func:`step`."""
    shadows, params = list(shadows), list(params)
    count = len(shadows)
    _check_length("params", params, count)
    _check_hyper("decay", decay, count)
    for each in decay if isinstance(decay, (list, tuple)) else (decay,):
        if not isinstance(each, Tensor):
            check_decay(each)
    for i in range(count):
        _check_row(i, "shadows", shadows[i], {"params": params[i]})
    if out is not None:
        _check_out([*shadows, *params, *(_entry(decay, i) for i in range(count))])
    new = [_ema_formula(shadows[i], params[i], _entry(decay, i)) for i in range(count)]
    if out is not None:
        _write(out, new, list(range(count)))
    return new


# --- From plain torch operations, for every kind of tensor and every transform.


class _SgdRow(NamedTuple):
    """A parameter with a gradient, and the hyper-parameters of it."""

    param: Tensor
    grad: Tensor
    buffer: Tensor | None
    lr: Number
    momentum: Number
    weight_decay: Number
    dampening: Number

    def tensors(self) -> list[Tensor]:
        return [each for each in self if isinstance(each, Tensor)]


def _sgd_formula(row: _SgdRow, nesterov: bool, maximize: bool) -> tuple[Tensor, Tensor | None]:
    """The equations of ``csrc/rules/sgd.h``, in their order."""
    dtype = _compute_dtype(row.param)
    p, g = _wide(row.param, dtype), _wide(row.grad, dtype)
    lr, momentum, weight_decay = (
        _number(value, p) for value in (row.lr, row.momentum, row.weight_decay)
    )
    d = -g if maximize else g
    if _is_on(row.weight_decay):
        d = d + weight_decay * p
    if not _is_on(row.momentum):
        return (p - lr * d).to(row.param.dtype), None
    if row.buffer is None:
        v = d.clone() if d is row.grad else d
    else:
        undamped = _number(row.dampening, p, complement=True) if _is_on(row.dampening) else 1
        v = momentum * _wide(row.buffer, dtype) + undamped * d
    u = d + momentum * v if nesterov else v
    buffer_dtype = row.param.dtype if row.buffer is None else row.buffer.dtype
    return (p - lr * u).to(row.param.dtype), v.to(buffer_dtype)


def _ema_formula(shadow: Tensor, param: Tensor, decay: Number) -> Tensor:
    """The equation of ``csrc/rules/ema.h``."""
    dtype = _compute_dtype(shadow)
    s, p = _wide(shadow, dtype), _wide(param, dtype)
    weight = _number(decay, s, complement=True)
    if isinstance(weight, Tensor):
        weight = weight.to(dtype)
    return torch.lerp(s, p, weight).to(shadow.dtype)


def _is_on(value: Number) -> bool:
    """Whether a hyper-parameter has a term of its own: a tensor always, whatever it holds."""
    return isinstance(value, Tensor) or value != 0


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in HALF_DTYPES else tensor.dtype


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).to(dtype)


def _number(value: Number, like: Tensor, complement: bool = False) -> Number:
    """A hyper-parameter (or 1 minus it) to compute with, in the dtype of the parameter."""
    if not isinstance(value, Tensor):
        return 1 - value if complement else value
    dtype = like.dtype.to_real()
    scalar = value.reshape(()).to(like.device)
    if complement:
        scalar = 1 - scalar.to(torch.promote_types(scalar.dtype, dtype))
    return scalar.to(dtype)


def _write(out: Sequence[Tensor | None], new: list[Any], active: list[int]) -> None:
    """Moves results to tensors that are there for them."""
    for i in active:
        target = out[i]
        if target is not None and new[i] is not None:
            new[i] = target.detach().copy_(new[i])


# --- Arguments


def _check_length(name: str, found: Sequence[Any], expected: int) -> None:
    if len(found) != expected:
        raise ValueError(
            f"{name}: expected {expected} entries, one per parameter, got {len(found)}"
        )


def _check_hyper(name: str, value: Any, count: int) -> None:
    if isinstance(value, (list, tuple)):
        _check_length(name, value, count)
        for i, entry in enumerate(value):
            _check_number(f"{name}[{i}]", entry)
    else:
        _check_number(name, value)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        as_scalar(value, name)
    elif not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: expected a number, a tensor of one element, or a list with one of these per "
            f"parameter, got {type(value).__name__}"
        )


def _check_nesterov(hypers: SgdHypers) -> None:
    """As in ``torch.optim.SGD``, but for tensors, which are not looked at."""
    momentums, dampenings = (
        value if isinstance(value, (list, tuple)) else (value,)
        for value in (hypers.momentum, hypers.dampening)
    )
    has_momentum = all(isinstance(each, Tensor) or each > 0 for each in momentums)
    if not has_momentum or any(not isinstance(each, Tensor) and each != 0 for each in dampenings):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def _check_row(i: int, name: str, param: Any, others: dict[str, Any]) -> None:
    """Checks tensors that belong together."""
    for of, tensor in {name: param, **others}.items():
        if of == "momentum_buffers" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{of}[{i}]: expected a torch.Tensor, got {type(tensor).__name__}")
        for what in ("device", "shape"):
            expected, found = getattr(param, what), getattr(tensor, what)
            if what == "shape":
                expected, found = tuple(expected), tuple(found)
            if expected != found:
                raise ValueError(
                    f"{of}[{i}]: expected {what} {expected} like {name}[{i}], got {found}"
                )
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{of}[{i}]: expected a floating-point or complex dtype, got {tensor.dtype}"
            )


def _check_out(inputs: list[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise ValueError("out: expected inputs of which none requires a gradient, or no_grad")


def _entry(value: Any, i: int) -> Any:
    """The hyper-parameter of row i."""
    return value[i] if isinstance(value, (list, tuple)) else value
