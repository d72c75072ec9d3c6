"""The same step from plain torch operations, for tensors that the kernels do not reach.

Runs for sparse and complex tensors, for tensor subclasses, and for ``differentiable=True``, where
autograd has to see every operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from fused_opt._hyper import ClipHyper, SgdHyper, as_scalar
from fused_opt._masters import exact_value, store_
from fused_opt._rounding import Rounding, Stream, narrow_, widened

_Maybe = TypeVar("_Maybe", Tensor, "Tensor | None")


def sgd_formula(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, hyper: SgdHyper
) -> tuple[Tensor, Tensor | None]:
    """Returns the new parameter and the new momentum, as new tensors.

    The equations of ``csrc/rules/sgd.h`` with every hyper-parameter open to autograd. The first
    momentum, when ``momentum_buffer`` is None, is the gradient itself, attached to its graph.
    """
    lr, momentum, dampening, weight_decay = (
        as_scalar(getattr(hyper, name), name)
        for name in ("lr", "momentum", "dampening", "weight_decay")
    )
    descent = unscaled(grad, hyper)
    descent = -descent if hyper.maximize else descent
    # Whether to decay is asked of the number, never of a tensor: a zero may need its gradient.
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if hyper.decoupled_weight_decay:
            param = (1 - lr * weight_decay) * param
        else:
            descent = descent + weight_decay * param
    if hyper.state_key is None:
        return param - lr * descent, None

    gain = -lr if hyper.formulation == "sutskever" else 1
    if momentum_buffer is None:
        new_buffer = gain * descent
    else:
        new_buffer = momentum * momentum_buffer + gain * (1 - dampening) * descent
    # In this order: torch adds sparse to dense, and not dense to sparse.
    update = momentum * new_buffer + gain * descent if hyper.nesterov else new_buffer
    if hyper.formulation == "sutskever":
        return param + update, new_buffer
    return param - lr * update, new_buffer


def unscaled(grad: Tensor, hyper: SgdHyper) -> Tensor:
    """The gradient of the loss itself, clipped; it is not written."""
    if hyper.grad_scale != 1:
        grad = grad * (1 / hyper.grad_scale)
    if hyper.clip is not None:  # float64, which would widen a gradient of no dimensions
        grad = (grad * hyper.clip.to(grad.device)).to(grad.dtype)
    return grad


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    hyper: SgdHyper,
) -> None:
    """Updates the lists in place, as ``torch.optim.SGD`` does where nothing is fused.

    ``momentum_buffers`` may hold None, which is replaced; it is ignored without momentum.
    """
    # For torch a momentum of 0 is none, but one that is a tensor is kept.
    if hyper.formulation == "torch" and bool(hyper.momentum) == hyper.has_momentum():
        options: dict[str, Any] = {
            name: getattr(hyper, name)
            for name in ("lr", "dampening", "weight_decay", "nesterov", "maximize")
        }
        options["momentum"] = float(hyper.momentum)
        if hyper.decoupled_weight_decay:
            decay = as_scalar(options.pop("weight_decay"), "weight_decay")
            for param in params:
                param.mul_(1 - as_scalar(hyper.lr, "lr") * decay)
            options["weight_decay"] = 0
        own_grads = [unscaled(grad, hyper) for grad in grads]
        if hyper.nesterov and momentum_buffers:
            own_grads = list(map(_addable, own_grads, momentum_buffers))
        at_start = _at_storage_start
        with at_start(params, grads) as values, at_start(momentum_buffers, grads) as buffers:
            torch_sgd(values, own_grads, buffers, foreach=False, fused=False, **options)
    else:
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            buffer = momentum_buffers[i] if hyper.state_key else None
            new_param, new_buffer = sgd_formula(param, grad, buffer, hyper)
            param.copy_(new_param)
            if buffer is not None and new_buffer is not None:
                buffer.copy_(new_buffer)
            elif hyper.state_key:
                momentum_buffers[i] = new_buffer
    if hyper.reset_grads:
        for grad in grads:
            grad.zero_()


@contextmanager
def _at_storage_start(tensors: list[_Maybe], grads: list[Tensor]) -> Iterator[list[_Maybe]]:
    """The tensors, or copies of those that torch would miss, which are written back at the end.

    To a dense tensor that starts inside its storage, torch adds a sparse one at twice that offset.
    """
    moved = [
        tensor.clone()
        if tensor is not None
        and grad.is_sparse
        and not tensor.is_sparse
        and tensor.storage_offset()
        else tensor
        for tensor, grad in zip(tensors, grads, strict=False)  # no momentum is an empty list
    ]
    yield moved
    for i, (tensor, value) in enumerate(zip(tensors, moved, strict=True)):
        if tensor is None or value is None:
            tensors[i] = value
        elif value is not tensor:
            tensor.copy_(value)


def _addable(grad: Tensor, buffer: Tensor | None) -> Tensor:
    """A gradient to which torch can add the momentum: not sparse where that is dense."""
    has_dense_momentum = buffer is not None and not buffer.is_sparse
    return grad.to_dense() if grad.is_sparse and has_dense_momentum else grad


def ema_update_(
    shadows: list[Tensor | None],
    params: list[Tensor],
    decays: list[float],
    rounding: Rounding | None = None,
    stream: int = Stream.SHADOW,
) -> None:
    """Updates the shadows of one average in place; each is rounded once, to its own dtype."""
    values = widened(shadows, rounding, beside=params)
    for value, param, decay in zip(values, params, decays, strict=True):
        if value is not None and decay == 0:
            value.copy_(param.detach())  # also beside inf and NaN
        elif value is not None:
            value.lerp_(param.detach().to(value.dtype), 1 - decay)
    narrow_(shadows, values, rounding, stream)


class Refined:
    """Parameters as the values that a step updates: the exact ones, where there is a refinement.

    Those without one are widened if they are rounded stochastically.
    """

    def __init__(
        self,
        params: list[Tensor],
        refinements: list[Tensor | None] | None,
        rounding: Rounding | None = None,
    ) -> None:
        self._params = params
        self._refinements = refinements or [None] * len(params)
        self._rounding = rounding
        self._plain = [
            param if refinement is None else None
            for param, refinement in zip(params, self._refinements, strict=True)
        ]
        self.values: list[Tensor] = [
            value if refinement is None else exact_value(param, refinement).clone()
            for param, value, refinement in zip(
                params, widened(self._plain, rounding), self._refinements, strict=True
            )
        ]

    def store_(self) -> None:
        """Writes the values back."""
        narrow_(self._plain, self.values, self._rounding, Stream.PARAM)
        for value, param, refinement in zip(
            self.values, self._params, self._refinements, strict=True
        ):
            if refinement is not None:
                store_(value, param, refinement)


def grad_norm(grad: Tensor, hyper: ClipHyper) -> Tensor:
    """The norm of one gradient of any kind, a tensor of no dimensions."""
    values = grad.detach()
    if values.layout == torch.sparse_coo:
        values = values.coalesce().values()
    elif values.layout != torch.strided:
        values = values.values()
    if values.numel() == 0:  # which has no largest element
        return values.new_zeros((), dtype=torch.float32)
    half = values.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if half else None
    norm: Tensor = torch.linalg.vector_norm(values, hyper.order, dtype=dtype)
    if hasattr(norm, "full_tensor"):  # a DTensor, of which every process has a part
        norm = norm.full_tensor()
    return norm / _on(norm.device, hyper.grad_scale)


def clip_coefficient(norms: list[Tensor], hyper: ClipHyper) -> tuple[Tensor, Tensor]:
    """The norm of gradients from their norms, and what clips them: ``ClipRule`` in torch."""
    norm = torch.linalg.vector_norm(torch.stack(norms), hyper.order)
    return norm, (_on(norm.device, hyper.max_norm) / (norm + 1e-6)).clamp(max=1.0)


def _on(device: torch.device, value: float | Tensor) -> float | Tensor:
    return value.reshape(()).to(device) if isinstance(value, Tensor) else value
