"""Momentum SGD and EMA on lists of tensors, with no optimizer object.

:func:`sgd_step_` and :func:`ema_update_` work in place: the kernels of :class:`fused_opt.SGD` and
:class:`fused_opt.EMA` behind plain functions. ``torch.compile(fullgraph=True)`` takes both into its
graphs, as operators of the same names in ``torch.ops.fused_opt``.

:func:`sgd_step` and :func:`ema_update` return new tensors, and autograd looks through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_opt import _differentiable, _ops
from fused_opt._averages import Averages
from fused_opt._hyper import (
    SgdHyper,
    check_decay,
    check_formulation,
    check_state_dtype,
    check_uint64,
    is_hidden,
    visible,
)
from fused_opt._plan import Rows, thread_plan
from fused_opt._rounding import Rounding


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor = 0,
    dampening: float | Tensor = 0,
    weight_decay: float | Tensor = 0,
    nesterov: bool = False,
    maximize: bool = False,
    formulation: str = "torch",
    decoupled_weight_decay: bool = False,
    reset_grads: bool = False,
    state_dtype: torch.dtype | None = None,
    shadows: Sequence[Tensor | None] | None = None,
    decay: float | Tensor | None = None,
    refinements: Sequence[Tensor | None] | None = None,
    rounding: tuple[int, int] | None = None,
) -> None:
    r"""One step of momentum SGD on every parameter, and of its EMA, in one pass over memory.

    .. math::
        d &= \pm g + \lambda p \\
        v &\leftarrow \mu v + (1 - \tau) d \\
        p &\leftarrow p - \eta\,(d + \mu v \text{ if nesterov, else } v) \\
        s &\leftarrow s + (1 - \beta)(p - s)

    with lr η, momentum μ, dampening τ, weight decay λ, EMA decay β. The ``"sutskever"``
    formulation is given at :class:`fused_opt.SGD`.

    Args:
        params: tensors of any shapes, updated in place; float32, bfloat16, float16 or float64, on
            CPU or CUDA, mixed at will.
        grads: of the same shapes and devices. Any of float32, bfloat16 and float16 beside any of
            them, float64 beside float64.
        momentum_buffers: of the same shapes, devices and choice of dtypes, updated in place. None
            in the list stands for a parameter's first step, which is not dampened, and is replaced
            by the new buffer. The list itself may be None or empty if momentum is 0.
        lr: the learning rate. It, ``momentum``, ``dampening``, ``weight_decay`` and ``decay`` may
            be one-element tensors; on the parameters' GPU they are read there, and not checked.
        momentum: 0 keeps no buffers; a tensor always does.
        dampening: scales the gradient on its way into the buffer by ``1 - dampening``.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: steps along the momentum of the next step.
        maximize: ascends instead of descending.
        formulation: ``"torch"`` or ``"sutskever"``, whose buffers hold −lr·v.
        decoupled_weight_decay: shrinks the parameters by ``1 - lr * weight_decay`` instead.
        reset_grads: fills the gradients with 0 once they are read.
        state_dtype: of new momentum buffers; None for the parameter's.
        shadows: moving averages of the parameters, updated in place; of the same choice of dtypes,
            or float32 beside float64. None in the list leaves a parameter without one.
        decay: of the moving averages, in [0, 1]; required with ``shadows``.
        refinements: of bfloat16 and float16 parameters, updated in place: a float32 master, the
            int16 residual of one (bfloat16 only), or a compensation in the parameter's dtype; see
            ``master_weights`` of :class:`fused_opt.SGD`. None in the list leaves a parameter
            without one.
        rounding: a seed and the count of the step, integers in [0, 2**64): bfloat16 and float16
            parameters without a refinement, buffers and shadows are rounded stochastically, by
            numbers that depend on both and on the parameter's place in the list; see
            ``stochastic_rounding`` of :class:`fused_opt.SGD`. None rounds to nearest.

    Raises:
        ValueError: a list of another length, tensors that differ in shape or device or share
            memory, dtypes without a kernel, a hyper-parameter out of range. Nothing has changed.
        TypeError: an entry is no tensor. Nothing has changed.

    Example:
        >>> import torch
        >>> from fused_opt.functional import sgd_step_
        >>> p, s, buffers = torch.ones(3), torch.zeros(3), [None]
        >>> sgd_step_([p], [torch.full((3,), 2.0)], buffers, lr=0.1, momentum=0.9,
        ...           shadows=[s], decay=0.5)
        >>> p, s, buffers
        (tensor([0.8000, 0.8000, 0.8000]), tensor([0.4000, 0.4000, 0.4000]), [tensor([2., 2., 2.])])
    """
    hyper = SgdHyper(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        formulation=formulation,
        decoupled_weight_decay=decoupled_weight_decay,
        reset_grads=reset_grads,
        state_dtype=state_dtype,
    )
    _check(hyper)
    has_momentum = hyper.has_momentum()
    _check_length("grads", grads, params)
    if has_momentum or momentum_buffers:
        _check_length("momentum_buffers", momentum_buffers, params)
    if (shadows is None) != (decay is None):
        raise ValueError("expected shadows and decay together, got only one of them")
    if shadows is not None:
        _check_length("shadows", shadows, params)
        check_decay(decay)
    if refinements is not None:
        _check_length("refinements", refinements, params)
    if rounding is not None:
        if not isinstance(rounding, tuple) or len(rounding) != 2:
            raise ValueError(f"rounding: expected None or (seed, step), got {rounding!r}")
        check_uint64(rounding[0], "rounding seed")
        check_uint64(rounding[1], "rounding step")
    if torch.compiler.is_compiling():
        _ops.trace_sgd_step_(
            params, grads, momentum_buffers, shadows, refinements, hyper, decay, rounding
        )
        return

    rows = Rows(
        list(params),
        list(grads),
        list(momentum_buffers or ()) if has_momentum else None,
        None if shadows is None else list(shadows),
        None if refinements is None else list(refinements),
        None if rounding is None else Rounding(*rounding, range(len(params))),
    )
    first = [i for i, momentum in enumerate(rows.momentum_buffers or ()) if momentum is None]
    later = [i for i in range(len(params)) if i not in set(first)] if first else None
    first_rows, later_rows = rows.take(first), rows if later is None else rows.take(later)
    with thread_plan(params) as plan:
        if first:
            plan.require_no_capture(first_rows)
        if decay is not None:
            plan.set_averages(_average(decay))
        plan.add_first_sgd(first_rows, hyper)
        plan.add_sgd(later_rows, hyper)
        plan.run()
    if momentum_buffers is not None:
        for i, new in zip(first, first_rows.momentum_buffers or (), strict=True):
            momentum_buffers[i] = new


@torch.no_grad()
def ema_update_(
    shadows: Sequence[Tensor], params: Sequence[Tensor], *, decay: float | Tensor
) -> None:
    r"""One step of the exponential moving average of every parameter.

    .. math:: s \leftarrow s + (1 - \beta)(p - s)

    evaluated as ``torch.lerp`` does; decay 0 copies exactly, and decay 1 keeps the shadow exactly.

    Args:
        shadows: the averages, updated in place; float32, bfloat16 or float16 in any mixture, or
            float64.
        params: of the same shapes and devices; float32, bfloat16 or float16, or float64 beside a
            float64 or float32 average.
        decay: β, in [0, 1]; a one-element tensor on the parameters' GPU is read there.

    Raises:
        ValueError: lists of different length, tensors that differ in shape or device or share
            memory, dtypes without a kernel, decay outside [0, 1]. Nothing has changed.
        TypeError: an entry is no tensor. Nothing has changed.

    Example:
        >>> import torch
        >>> from fused_opt.functional import ema_update_
        >>> s = torch.zeros(3)
        >>> ema_update_([s], [torch.ones(3)], decay=0.75)
        >>> s
        tensor([0.2500, 0.2500, 0.2500])
    """
    check_decay(decay)
    _check_length("shadows", shadows, params)
    if torch.compiler.is_compiling():
        _ops.trace_ema_update_(shadows, params, decay)
        return
    with thread_plan(params) as plan:
        plan.set_averages(_average(decay))
        plan.add_ema(list(params), list(shadows))
        plan.run()


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    momentum: float | Tensor | Sequence[float | Tensor] = 0,
    weight_decay: float | Tensor | Sequence[float | Tensor] = 0,
    dampening: float | Tensor | Sequence[float | Tensor] = 0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    r"""One step of momentum SGD on every parameter, as new tensors that autograd looks through.

    .. math::
        d &= \pm g + \lambda p \\
        v' &= \mu v + (1 - \tau) d \quad (v' = d \text{ at the first step}) \\
        p' &= p - \eta\,(d + \mu v' \text{ if nesterov, else } v')

    with lr η, momentum μ, weight decay λ, dampening τ. All of them, and p, g and v, may require
    gradients, and derivatives of any order are exact.

    Hyper-parameters are numbers, tensors of one element, or lists with one of these for each
    parameter. A tensor is never looked at: one that holds 0 has its term and its gradient, where
    the number 0 has neither; on a GPU it is read there. A tensor that holds a hyper-parameter is
    used as the value that it has in its own dtype.

    Args:
        params: tensors of any shapes and devices.
        grads: of the same shapes and devices. None leaves a parameter and its buffer as they are,
            and returns the very same objects.
        momentum_buffers: of the same shapes and devices. None in the list, or for the list, stands
            for a parameter's first step, which is not dampened.
        lr: the learning rate.
        momentum: the number 0 keeps no buffers; a tensor always does.
        weight_decay: L2 penalty, added to the gradient.
        dampening: scales the gradient on its way into the buffer by ``1 - dampening``.
        nesterov: steps along the momentum of the next step.
        maximize: ascends instead of descending.

    Returns:
        New parameters and new momentum buffers, in which None stands for no momentum. New
        parameters have the dtypes and memory formats of the old ones, and first buffers the dtypes
        of their parameters.

    Raises:
        ValueError: a list of another length, tensors that differ in shape or device, a dtype that
            is neither floating-point nor complex, a hyper-parameter with more than one element, or
            nesterov with a number as momentum that is not above 0 or as dampening that is not 0.
        TypeError: an entry is no tensor, or a hyper-parameter no number.

    Example:
        >>> import torch
        >>> from fused_opt.functional import sgd_step
        >>> p, lr = torch.ones(3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
        >>> (g,) = torch.autograd.grad((p**2).sum(), p, create_graph=True)
        >>> (new,), buffers = sgd_step([p], [g], lr=lr, momentum=0.9)
        >>> new.sum().backward()  # through the step, and through the gradient
        >>> new.detach(), p.grad, lr.grad
        (tensor([0.8000, 0.8000, 0.8000]), tensor([0.8000, 0.8000, 0.8000]), tensor(-6.))
    """
    hypers = _differentiable.SgdHypers(lr, momentum, weight_decay, dampening)
    return _differentiable.step(params, grads, momentum_buffers, hypers, nesterov, maximize)


def ema_update(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor | Sequence[float | Tensor],
) -> list[Tensor]:
    r"""One step of the moving average of every parameter, as new tensors for autograd.

    .. math:: s' = \beta s + (1 - \beta) p

    evaluated as ``torch.lerp`` does. Shadows, parameters and decays may require gradients.

    Args:
        shadows: the averages; tensors of any shapes and devices.
        params: of the same shapes and devices.
        decay: β, as the hyper-parameters of :func:`sgd_step`.

    Returns:
        New shadows, in the dtypes and memory formats of the old ones.

    Raises:
        ValueError: a list of another length, tensors that differ in shape or device, a dtype that
            is neither floating-point nor complex, a decay with more than one element, or a number
            outside [0, 1].
        TypeError: an entry is no tensor, or a decay no number.

    Example:
        >>> import torch
        >>> from fused_opt.functional import ema_update
        >>> s, decay = torch.zeros(3), torch.tensor(0.75, requires_grad=True)
        >>> (new,) = ema_update([s], [torch.ones(3)], decay=decay)
        >>> new.sum().backward()
        >>> new.detach(), decay.grad
        (tensor([0.2500, 0.2500, 0.2500]), tensor(-3.))
    """
    return _differentiable.update(shadows, params, decay)


def _check(hyper: SgdHyper) -> None:
    """The checks of the ``torch.optim.SGD`` constructor, and of what it does not have."""
    if isinstance(hyper.lr, Tensor) and hyper.lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    names = {"lr": "learning rate", "momentum": "momentum value", "weight_decay": "weight_decay"}
    numbers = {name: visible(getattr(hyper, name), name) for name in (*names, "dampening")}
    for name, words in names.items():
        if not is_hidden(getattr(hyper, name)) and numbers[name] < 0.0:
            raise ValueError(f"Invalid {words}: {numbers[name]}")
    has_momentum = is_hidden(hyper.momentum) or numbers["momentum"] > 0
    undamped = is_hidden(hyper.dampening) or numbers["dampening"] == 0
    if hyper.nesterov and not (has_momentum and undamped):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    check_formulation(hyper.formulation)
    check_state_dtype(hyper.state_dtype)


def _average(decay: float | Tensor) -> Averages:
    """One average, of whatever is in the lists."""
    return Averages({}, (decay,))


def _check_length(name: str, tensors: Sequence[Any] | None, params: Sequence[Tensor]) -> None:
    found = "None" if tensors is None else str(len(tensors))
    if found != str(len(params)):
        raise ValueError(f"{name}: expected {len(params)} entries, one per parameter, got {found}")


_ops.register(sgd_step_, ema_update_)
