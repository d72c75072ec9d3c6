"""The contestants: one optimizer step with the same maths, done by fused_opt and by torch.

A provider has a name and a `setup(params, grads)` that returns a `Step`. All run momentum SGD with
weight decay; with an EMA, torch follows the step with the fastest averaging that it offers. In the
whole tail of a training step, gradients are clipped before it and filled with 0 after it. With
masters, half-precision parameters are the rounding of float32 weights that the step updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import fused_opt

LR = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
DECAY = 0.999
MAX_NORM = 1.0  # far below the norm of the gradients: all are scaled


@dataclass(frozen=True)
class Op:
    """What is timed: SGD alone, with the update of an EMA shadow, or with more than that."""

    name: str
    ema: bool
    clip: bool = False  # by the norm before the step, and gradients filled with 0 after it
    master: bool = False  # of half-precision parameters: float32, as the momentum beside it

    def suits(self, dtype: torch.dtype) -> bool:
        """Tells whether parameters of that dtype can be updated so."""
        return dtype.itemsize == 2 or not self.master

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes kept per parameter: parameter and momentum, shadow and master (these fp32)."""
        wide = torch.float32.itemsize
        momentum = wide if self.master else dtype.itemsize
        return dtype.itemsize + momentum + wide * (self.ema + self.master)

    def moved_bytes(self, dtype: torch.dtype) -> int:
        """Bytes per parameter that must move: state both ways, the gradient once.

        Clipping reads the gradient once more, since the norm is needed first, and a reset writes
        it. Beside a master the parameter is only written.
        """
        param_reads = dtype.itemsize if self.master else 0
        return 2 * self.state_bytes(dtype) + (3 if self.clip else 1) * dtype.itemsize - param_reads


SGD = Op("SGD", ema=False)
SGD_EMA = Op("SGD + EMA", ema=True)
CLIP_SGD_EMA = Op("clip + SGD + EMA + reset", ema=True, clip=True)
MASTER_SGD_EMA = Op("SGD + EMA, fp32 master", ema=True, master=True)
OPS = (SGD, SGD_EMA, CLIP_SGD_EMA, MASTER_SGD_EMA)


@dataclass(frozen=True)
class Step:
    """One optimizer step over tensors of its own, and the state that it reads and writes."""

    run: Callable[[], object]
    optimizer: torch.optim.SGD
    params: list[Tensor]
    grads: list[Tensor]
    shadows: list[Tensor] = field(default_factory=list)
    grad_norm: Callable[[], Tensor] | None = None  # of the last step, where it is clipped
    masters: Callable[[], list[Tensor]] | None = None  # whose roundings the parameters are

    @property
    def momentum_buffers(self) -> list[Tensor]:
        """The momentum buffers, which exist after the first step."""
        return [state["momentum_buffer"] for state in self.optimizer.state.values()]


@dataclass(frozen=True)
class Provider:
    """A named way to do an op; `refusal` says why it is left out, where it is."""

    name: str
    setup: Callable[[list[Tensor], list[Tensor]], Step]
    is_torch: bool = True
    refusal: str | None = None


def as_parameters(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns leaf parameters over the same memory, with the gradients attached."""
    parameters: list[Tensor] = []
    for param, grad in zip(params, grads, strict=True):
        parameters.append(torch.nn.Parameter(param))
        parameters[-1].grad = grad
    return parameters


def fused_opt_sgd(params: list[Tensor], grads: list[Tensor], *, op: Op) -> Step:
    """fused_opt: SGD, and the EMA and the reset in the same pass."""
    parameters = as_parameters(params, grads)
    average = fused_opt.EMA(parameters, decay=DECAY) if op.ema else None
    optimizer = fused_opt.SGD(
        parameters,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        ema=average,
        max_grad_norm=MAX_NORM if op.clip else None,
        reset_grads=op.clip,
        master_weights="fp32" if op.master else None,
    )
    shadows = list(average.shadows.values()) if average is not None else []

    def grad_norm() -> Tensor:
        assert optimizer.grad_norm is not None
        return optimizer.grad_norm

    def masters() -> list[Tensor]:
        return [state["master"] for state in optimizer.state.values()]

    return Step(
        optimizer.step,
        optimizer,
        parameters,
        grads,
        shadows,
        grad_norm if op.clip else None,
        masters if op.master else None,
    )


Average = Callable[[list[Tensor], list[Tensor]], Callable[[], object]]


def foreach_lerp(shadows: list[Tensor], params: list[Tensor]) -> Callable[[], object]:
    """Averages with one multi-tensor call; half parameters are first widened into kept copies."""
    weight = 1 - DECAY
    if params[0].dtype == shadows[0].dtype:
        return lambda: torch._foreach_lerp_(shadows, params, weight)
    wide = [torch.empty_like(shadow) for shadow in shadows]

    def update() -> None:
        torch._foreach_copy_(wide, params)
        torch._foreach_lerp_(shadows, wide, weight)

    return update


def float_lerp(shadows: list[Tensor], params: list[Tensor]) -> Callable[[], object]:
    """Averages tensor by tensor, so that the widened copy of a half parameter stays in cache."""
    weight = 1 - DECAY

    def update() -> None:
        for shadow, param in zip(shadows, params, strict=True):
            shadow.lerp_(param.float(), weight)

    return update


def torch_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    *,
    average: Average | None,
    implementation: dict[str, bool],
) -> Step:
    """torch.optim.SGD in one of its implementations, followed by an average if one is given."""
    parameters = as_parameters(params, grads)
    optimizer = torch.optim.SGD(
        parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **implementation
    )
    if average is None:
        return Step(optimizer.step, optimizer, parameters, grads)

    # Detached aliases, cached once: autograd refuses to lerp leaves, and no_grad costs host time.
    aliases = [parameter.detach() for parameter in parameters]
    shadow_dtype = torch.promote_types(aliases[0].dtype, torch.float32)
    shadows = [alias.to(shadow_dtype, copy=True) for alias in aliases]
    update = average(shadows, aliases)

    def step() -> None:
        optimizer.step()
        update()

    return Step(step, optimizer, parameters, grads, shadows)


def torch_tail(
    params: list[Tensor],
    grads: list[Tensor],
    *,
    average: Average | None,
    implementation: dict[str, bool],
    scale_in_step: bool,
) -> Step:
    """Clips, does the step of `torch_sgd`, and fills the gradients with 0.

    Args:
        params: The parameters.
        grads: Their gradients.
        average: The average after the step.
        implementation: The one of torch.optim.SGD.
        scale_in_step: Leaves the scaling to the fused step, which can divide gradients by a scale
            that is meant for mixed precision (and stores the quotients).
    """
    step = torch_sgd(params, grads, average=average, implementation=implementation)
    norms: list[Tensor] = [torch.zeros(())]

    def run() -> None:
        if scale_in_step:
            norms[0] = torch.nn.utils.get_total_norm(step.grads, foreach=True)
            step.optimizer.grad_scale = ((norms[0] + 1e-6) / MAX_NORM).clamp(min=1.0)
        else:
            norms[0] = torch.nn.utils.clip_grad_norm_(step.params, MAX_NORM, foreach=True)
        step.run()
        step.optimizer.zero_grad(set_to_none=False)

    return replace(step, run=run, grad_norm=lambda: norms[0])


def torch_masters(params: list[Tensor], grads: list[Tensor], *, apart: bool) -> Step:
    """Widens the gradients, steps float32 masters and averages them, rounds the parameters.

    Args:
        params: The parameters.
        grads: Their gradients.
        apart: One tensor after the other, so that its copies stay in cache, instead of one kind of
            work after the other in multi-tensor calls.
    """
    wide = [grad.float() for grad in grads]
    masters = as_parameters([param.float() for param in params], wide)
    optimizer = torch.optim.SGD(
        masters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )
    for master in masters:
        optimizer.state[master]["momentum_buffer"] = torch.zeros_like(master)
    aliases = [master.detach() for master in masters]
    shadows = [alias.clone() for alias in aliases]
    weight = 1 - DECAY

    def together() -> None:
        torch._foreach_copy_(wide, grads)
        optimizer.step()
        torch._foreach_copy_(params, aliases)
        torch._foreach_lerp_(shadows, aliases, weight)

    rows = list(zip(params, grads, wide, aliases, shadows, strict=True))
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]

    def one_by_one() -> None:
        for (param, grad, copy, master, shadow), buffer in zip(rows, buffers, strict=True):
            copy.copy_(grad)
            fused_sgd([master], [copy], [buffer])
            param.copy_(master)
            shadow.lerp_(master, weight)

    run = one_by_one if apart else together
    return Step(run, optimizer, params, grads, shadows, masters=lambda: aliases)


# What torch.optim.SGD calls, without its 10 us of Python.
fused_sgd = partial(
    torch._fused_sgd_,
    lr=LR,
    momentum=MOMENTUM,
    weight_decay=WEIGHT_DECAY,
    dampening=0.0,
    nesterov=False,
    maximize=False,
    is_first_step=False,
)


FUSED_IS_WRONG = "refused, wrong for half types on the CPU (pytorch #191763)"


def providers(op: Op, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """Returns the contestants of an op, fused_opt first."""
    ours = Provider("fused_opt", partial(fused_opt_sgd, op=op), is_torch=False)
    if op.master:
        return [
            ours,
            Provider("copy + fused + copy + lerp", partial(torch_masters, apart=False)),
            Provider("the same, tensor by tensor", partial(torch_masters, apart=True)),
        ]
    half = dtype.itemsize == 2
    refusal = FUSED_IS_WRONG if half and device.type == "cpu" else None
    implementations = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    if refusal:  # without the fused step, the plain loop is torch's fastest on large tensors
        implementations["for-loop"] = {"foreach": False}
    averages: dict[str, Average | None] = {"": None}
    if op.ema:
        averages = {" + foreach_lerp_": foreach_lerp}
        if half:
            averages[" + float().lerp_"] = float_lerp

    contestants = [ours]
    for name, options in implementations.items():
        for suffix, average in averages.items():
            kinds: dict[str, Callable[..., Step]] = {f"torch {name}{suffix}": torch_sgd}
            if op.clip:  # names without "torch", which would not fit into 80 columns
                clip_first = partial(torch_tail, scale_in_step=False)
                kinds = {f"clip + {name}{suffix}": clip_first}
                if name == "fused":
                    clip_inside = partial(torch_tail, scale_in_step=True)
                    kinds[f"fused(scale){suffix}"] = clip_inside
            why = refusal if name == "fused" else None
            for kind, setup in kinds.items():
                step = partial(setup, average=average, implementation=options)
                contestants.append(Provider(kind, step, refusal=why))
    return contestants
