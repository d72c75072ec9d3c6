"""The contestants: one optimizer step with the same maths, done by fused_opt and by torch.

A provider has a name and a `setup(params, grads)` that returns a `Step`. All run momentum SGD with
weight decay; with EMAs, torch follows the step with the fastest averaging that it offers. An update
of EMAs alone steps nothing. In the whole tail of a training step, gradients are clipped before it
and filled with 0 after it. With masters, half-precision parameters are the rounding of float32
weights that the step updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_opt

LR = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
DECAYS = (0.999, 0.99, 0.9)  # of one average after the other
WEIGHTS = tuple(1 - decay for decay in DECAYS)
MAX_NORM = 1.0  # far below the norm of the gradients: all are scaled


@dataclass(frozen=True)
class Op:
    """What is timed: SGD alone, with the update of EMA shadows, or more than that; or only EMAs."""

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
        wide = torch.float32.itemsize
        momentum = wide if self.master else dtype.itemsize
        return dtype.itemsize + momentum * self.sgd + wide * (self.averages + self.master)

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


SGD = Op("SGD")
SGD_EMA = Op("SGD + EMA", averages=1)
SGD_EMAS = Op("SGD + 3 EMAs", averages=3)
EMA = Op("EMA update", averages=1, sgd=False)
EMAS = Op("3 EMAs in one update", averages=3, sgd=False)
CLIP_SGD_EMA = Op("clip + SGD + EMA + reset", averages=1, clip=True)
MASTER_SGD_EMA = Op("SGD + EMA, fp32 master", averages=1, master=True)
OPS = (SGD, SGD_EMA, SGD_EMAS, EMA, EMAS, CLIP_SGD_EMA, MASTER_SGD_EMA)


@dataclass(frozen=True)
class Step:
    """One optimizer step over tensors of its own, and the state that it reads and writes."""

    run: Callable[[], object]
    optimizer: torch.optim.SGD | None  # None: only the averages are updated
    params: list[Tensor]
    grads: list[Tensor]
    averages: list[list[Tensor]] = field(default_factory=list)  # the shadows of each
    grad_norm: Callable[[], Tensor] | None = None  # of the last step, where it is clipped
    masters: Callable[[], list[Tensor]] | None = None  # whose roundings the parameters are

    @property
    def momentum_buffers(self) -> list[Tensor]:
        """The momentum buffers, which exist after the first step."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return [state["momentum_buffer"] for state in states]


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


def fused_opt_ema(parameters: list[Tensor], op: Op) -> fused_opt.EMA:
    """An EMA with as many averages as the op has."""
    return fused_opt.EMA(parameters, decay=list(DECAYS[: op.averages]))


def averages_of(ema: fused_opt.EMA | None) -> list[list[Tensor]]:
    """The shadows of each average."""
    return [] if ema is None else [list(average.values()) for average in ema.averages]


def fused_opt_update(params: list[Tensor], grads: list[Tensor], *, op: Op) -> Step:
    """fused_opt: all averages in one pass."""
    parameters = as_parameters(params, grads)
    ema = fused_opt_ema(parameters, op)
    return Step(ema.update, None, parameters, grads, averages_of(ema))


def fused_opt_sgd(params: list[Tensor], grads: list[Tensor], *, op: Op) -> Step:
    """fused_opt: SGD, and the EMAs and the reset in the same pass."""
    parameters = as_parameters(params, grads)
    ema = fused_opt_ema(parameters, op) if op.averages else None
    optimizer = fused_opt.SGD(
        parameters,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        ema=ema,
        max_grad_norm=MAX_NORM if op.clip else None,
        reset_grads=op.clip,
        master_weights="fp32" if op.master else None,
    )

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
        averages_of(ema),
        grad_norm if op.clip else None,
        masters if op.master else None,
    )


Average = Callable[[list[list[Tensor]], list[Tensor]], Callable[[], object]]


def foreach_lerp(averages: list[list[Tensor]], params: list[Tensor]) -> Callable[[], object]:
    """Averages by a multi-tensor call each; half parameters are first widened into kept copies."""
    pairs = list(zip(averages, WEIGHTS, strict=False))
    is_wide = params[0].dtype == averages[0][0].dtype
    wide = params if is_wide else [torch.empty_like(shadow) for shadow in averages[0]]

    def update() -> None:
        if not is_wide:
            torch._foreach_copy_(wide, params)
        for shadows, weight in pairs:
            torch._foreach_lerp_(shadows, wide, weight)

    return update


def float_lerp(averages: list[list[Tensor]], params: list[Tensor]) -> Callable[[], object]:
    """Averages tensor by tensor, so that the widened copy of a half parameter stays in cache."""
    rows = list(zip(params, zip(*averages, strict=True), strict=True))

    def update() -> None:
        for param, shadows in rows:
            wide = param.float()
            for shadow, weight in zip(shadows, WEIGHTS, strict=False):
                shadow.lerp_(wide, weight)

    return update


def aliases_and_shadows(
    parameters: list[Tensor], count: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Detached aliases, cached once: autograd refuses to lerp leaves, and no_grad costs host time.

    The shadows of all averages start as copies of them, in full precision.
    """
    aliases = [parameter.detach() for parameter in parameters]
    dtype = torch.promote_types(aliases[0].dtype, torch.float32)
    return aliases, [[alias.to(dtype, copy=True) for alias in aliases] for _ in range(count)]


def torch_update(
    params: list[Tensor], grads: list[Tensor], *, average: Average, count: int
) -> Step:
    """Averages over cached lists, which is all the host time that torch needs."""
    parameters = as_parameters(params, grads)
    aliases, averages = aliases_and_shadows(parameters, count)
    return Step(average(averages, aliases), None, parameters, grads, averages)


def torch_averaged_model(params: list[Tensor], grads: list[Tensor]) -> Step:
    """torch.optim.swa_utils.AveragedModel, whose first update copies the model."""
    parameters = as_parameters(params, grads)
    model = torch.nn.ParameterList(parameters)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAYS[0]))
    shadows = [shadow.detach() for shadow in averaged.parameters()]
    return Step(partial(averaged.update_parameters, model), None, parameters, grads, [shadows])


def torch_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    *,
    average: Average | None,
    count: int,
    implementation: dict[str, bool],
) -> Step:
    """torch.optim.SGD in one of its implementations, followed by averages if there are any."""
    parameters = as_parameters(params, grads)
    optimizer = torch.optim.SGD(
        parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **implementation
    )
    if average is None:
        return Step(optimizer.step, optimizer, parameters, grads)

    aliases, averages = aliases_and_shadows(parameters, count)
    update = average(averages, aliases)

    def step() -> None:
        optimizer.step()
        update()

    return Step(step, optimizer, parameters, grads, averages)


def torch_tail(
    params: list[Tensor],
    grads: list[Tensor],
    *,
    average: Average | None,
    count: int,
    implementation: dict[str, bool],
    scale_in_step: bool,
) -> Step:
    """Clips, does the step of `torch_sgd`, and fills the gradients with 0.

    Args:
        params: The parameters.
        grads: Their gradients.
        average: How to average after the step.
        count: How many averages there are.
        implementation: The one of torch.optim.SGD.
        scale_in_step: Leaves the scaling to the fused step, which can divide gradients by a scale
            that is meant for mixed precision (and stores the quotients).
    """
    step = torch_sgd(params, grads, average=average, count=count, implementation=implementation)
    optimizer = step.optimizer
    assert optimizer is not None
    norms: list[Tensor] = [torch.zeros(())]

    def run() -> None:
        if scale_in_step:
            norms[0] = torch.nn.utils.get_total_norm(step.grads, foreach=True)
            optimizer.grad_scale = ((norms[0] + 1e-6) / MAX_NORM).clamp(min=1.0)
        else:
            norms[0] = torch.nn.utils.clip_grad_norm_(step.params, MAX_NORM, foreach=True)
        step.run()
        optimizer.zero_grad(set_to_none=False)

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
    aliases, (shadows,) = aliases_and_shadows(masters, 1)
    weight = WEIGHTS[0]

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
    return Step(run, optimizer, params, grads, [shadows], masters=lambda: aliases)


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
    half = dtype.itemsize == 2
    averages: dict[str, Average | None] = {"": None}
    if op.averages:
        averages = {"foreach_lerp_": foreach_lerp}
        if half:
            averages["float().lerp_"] = float_lerp
    if not op.sgd:
        return update_providers(op, averages, half)
    ours = Provider("fused_opt", partial(fused_opt_sgd, op=op), is_torch=False)
    if op.master:
        return [
            ours,
            Provider("copy + fused + copy + lerp", partial(torch_masters, apart=False)),
            Provider("the same, tensor by tensor", partial(torch_masters, apart=True)),
        ]
    refusal = FUSED_IS_WRONG if half and device.type == "cpu" else None
    implementations = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    if refusal:  # without the fused step, the plain loop is torch's fastest on large tensors
        implementations["for-loop"] = {"foreach": False}
    contestants = [ours]
    for name, options in implementations.items():
        for average_name, average in averages.items():
            suffix = f" + {average_name}" if average_name else ""
            kinds: dict[str, Callable[..., Step]] = {f"torch {name}{suffix}": torch_sgd}
            if op.clip:  # names without "torch", which would not fit into 80 columns
                clip_first = partial(torch_tail, scale_in_step=False)
                kinds = {f"clip + {name}{suffix}": clip_first}
                if name == "fused":
                    clip_inside = partial(torch_tail, scale_in_step=True)
                    kinds[f"fused(scale){suffix}"] = clip_inside
            why = refusal if name == "fused" else None
            for kind, setup in kinds.items():
                step = partial(setup, average=average, count=op.averages, implementation=options)
                contestants.append(Provider(kind, step, refusal=why))
    return contestants


def update_providers(op: Op, averages: dict[str, Average | None], half: bool) -> list[Provider]:
    """Returns the contestants of an update of averages alone."""
    contestants = [Provider("fused_opt", partial(fused_opt_update, op=op), is_torch=False)]
    for name, average in averages.items():
        step = partial(torch_update, average=average, count=op.averages)
        contestants.append(Provider(f"torch {name}", step))
    if op.averages == 1:
        refusal = "refused, keeps shadows in half precision" if half else None
        contestants.append(Provider("torch AveragedModel", torch_averaged_model, refusal=refusal))
    return contestants
