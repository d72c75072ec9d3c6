"""The contestants: one optimizer step with the same maths, done by fused_opt and by its peers.

A provider has a name and a `setup(params, grads)` that returns a `Step`. Peers are put together
from an optimizer and from something that averages; `providers` says which, and why one is absent.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_opt

from .ops import DECAYS, LR, MAX_NORM, MOMENTUM, WEIGHT_DECAY, WEIGHTS, Op

Run = Callable[[], object]
Tensors = list[Tensor]
OURS = "fused_opt"

#: What --against knows: the peers, and what each is.
PEERS = {
    "torch-fused": "torch.optim.SGD(fused=True)",
    "torch-foreach": "torch.optim.SGD(foreach=True); averages by torch._foreach_lerp_",
    "torch-forloop": "torch.optim.SGD(foreach=False); averages tensor by tensor",
    "torch-compile": "the step as one function under torch.compile",
    "torch-averaged-model": "averages by torch.optim.swa_utils.AveragedModel",
    "torch-ema": "averages by the package torch-ema",
    "ema-pytorch": "averages by the package ema-pytorch",
    "timm": "averages by timm.utils.ModelEmaV3",
    "apex": "apex.optimizers.FusedSGD",
}

# A compiled step is unrolled over the tensors: on the CPU, where each gets a loop of its own, 64
# tensors take a quarter of a minute and 160 more than half a minute on two cores. On CUDA, inductor
# puts many tensors into one kernel.
COMPILED_TENSORS = {"cpu": 16, "cuda": 400}


@dataclass(frozen=True)
class Step:
    """One optimizer step over tensors of its own, and the state that it reads and writes."""

    run: Run
    params: Tensors
    grads: Tensors
    momentum: Callable[[], Tensors] | None  # the buffers; None: only averages are updated
    averages: list[Tensors] = field(default_factory=list)  # the shadows of each
    grad_norm: Callable[[], Tensor] | None = None  # of the last step, where it is clipped
    masters: Callable[[], Tensors] | None = None  # whose roundings the parameters are

    def tensors(self) -> Tensors:
        """All that a step reads and writes; the momentum exists after the first."""
        state = [each() for each in (self.momentum, self.masters) if each]
        lists = [self.params, self.grads, *self.averages, *state]
        return [tensor for each in lists for tensor in each]


@dataclass(frozen=True)
class Provider:
    """A way to do an op, by the peer that --against names; `absence` says why it is left out."""

    name: str
    peer: str
    setup: Callable[[Tensors, Tensors], Step]
    absence: str | None = None


@dataclass(frozen=True)
class Place:
    """What decides which peers can take part."""

    op: Op
    device: torch.device
    dtype: torch.dtype
    tensors: int
    compiles: bool = True

    @property
    def half(self) -> bool:
        """Whether parameters are of half precision."""
        return self.dtype.itemsize == 2


def as_parameters(params: Tensors, grads: Tensors) -> Tensors:
    """Returns leaf parameters over the same memory, with the gradients attached."""
    parameters: Tensors = []
    for param, grad in zip(params, grads, strict=True):
        parameters.append(torch.nn.Parameter(param))
        parameters[-1].grad = grad
    return parameters


def buffers_of(optimizer: torch.optim.Optimizer) -> Callable[[], Tensors]:
    """The momentum buffers, which exist after the first step."""
    return lambda: [state["momentum_buffer"] for state in optimizer.state.values()]


# ---- fused_opt -----------------------------------------------------------------------------------


def fused_opt_step(params: Tensors, grads: Tensors, *, op: Op) -> Step:
    """SGD with the averages, the clipping and the reset in the same pass; or averages alone."""
    parameters = as_parameters(params, grads)
    ema = fused_opt.EMA(parameters, decay=list(DECAYS[: op.averages])) if op.averages else None
    averages = [] if ema is None else [list(each.values()) for each in ema.averages]
    if not op.sgd:
        assert ema is not None
        return Step(ema.update, parameters, grads, None, averages)
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

    def masters() -> Tensors:
        return [state["master"] for state in optimizer.state.values()]

    return Step(
        optimizer.step,
        parameters,
        grads,
        buffers_of(optimizer),
        averages,
        grad_norm if op.clip else None,
        masters if op.master else None,
    )


# ---- Optimizers ----------------------------------------------------------------------------------

Optimizer = Callable[[Tensors], torch.optim.Optimizer]

torch_sgd = partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def apex_sgd(parameters: Tensors) -> torch.optim.Optimizer:
    """apex's, which has kernels for CUDA alone."""
    module = importlib.import_module("apex.optimizers")
    optimizer: torch.optim.Optimizer = module.FusedSGD(
        parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    return optimizer


OPTIMIZERS: dict[str, Optimizer] = {
    "torch-fused": partial(torch_sgd, fused=True),
    "torch-foreach": partial(torch_sgd, foreach=True),
    "torch-forloop": partial(torch_sgd, foreach=False),
    "apex": apex_sgd,
}

# ---- Averages ------------------------------------------------------------------------------------

#: Of the parameters and the number of averages: the update, and the shadows of each average.
Averager = Callable[[Tensors, int], tuple[Run, list[Tensors]]]


def aliases_and_shadows(parameters: Tensors, count: int) -> tuple[Tensors, list[Tensors]]:
    """Detached aliases, cached once: autograd refuses to lerp leaves, and no_grad costs host time.

    The shadows of all averages start as copies of them, in full precision.
    """
    aliases = [parameter.detach() for parameter in parameters]
    dtype = torch.promote_types(aliases[0].dtype, torch.float32)
    return aliases, [[alias.to(dtype, copy=True) for alias in aliases] for _ in range(count)]


def foreach_lerp(parameters: Tensors, count: int) -> tuple[Run, list[Tensors]]:
    """Averages by a multi-tensor call each; half parameters are first widened into kept copies."""
    aliases, averages = aliases_and_shadows(parameters, count)
    pairs = list(zip(averages, WEIGHTS, strict=False))
    is_wide = aliases[0].dtype == averages[0][0].dtype
    wide = aliases if is_wide else [torch.empty_like(shadow) for shadow in averages[0]]

    def update() -> None:
        if not is_wide:
            torch._foreach_copy_(wide, aliases)
        for shadows, weight in pairs:
            torch._foreach_lerp_(shadows, wide, weight)

    return update, averages


def float_lerp(parameters: Tensors, count: int) -> tuple[Run, list[Tensors]]:
    """Averages tensor by tensor, so that the widened copy of a half parameter stays in cache."""
    aliases, averages = aliases_and_shadows(parameters, count)
    rows = list(zip(aliases, zip(*averages, strict=True), strict=True))

    def update() -> None:
        for alias, shadows in rows:
            wide = alias.float()
            for shadow, weight in zip(shadows, WEIGHTS, strict=False):
                shadow.lerp_(wide, weight)

    return update, averages


def as_model(parameters: Tensors) -> torch.nn.Module:
    """What packages take that average a model."""
    return torch.nn.ParameterList(parameters)


def shadows_of(model: Any) -> list[Tensors]:
    """The parameters of the one averaged model."""
    return [[shadow.detach() for shadow in model.parameters()]]


def averaged_model(parameters: Tensors, _count: int) -> tuple[Run, list[Tensors]]:
    """torch.optim.swa_utils.AveragedModel, whose first update copies the model."""
    model = as_model(parameters)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAYS[0]))
    return partial(averaged.update_parameters, model), shadows_of(averaged)


def torch_ema(parameters: Tensors, _count: int) -> tuple[Run, list[Tensors]]:
    """The package torch-ema, with a constant decay."""
    module = importlib.import_module("torch_ema")
    ema = module.ExponentialMovingAverage(parameters, DECAYS[0], use_num_updates=False)
    return partial(ema.update, parameters), [ema.shadow_params]


def ema_pytorch(parameters: Tensors, _count: int) -> tuple[Run, list[Tensors]]:
    """The package ema-pytorch in multi-tensor calls, with a constant decay."""
    module = importlib.import_module("ema_pytorch")
    ema = module.EMA(
        as_model(parameters),
        beta=DECAYS[0],
        min_value=DECAYS[0],
        update_after_step=0,
        update_every=1,
        use_foreach=True,
    )
    return ema.update, shadows_of(ema.ema_model)


def timm_ema(parameters: Tensors, _count: int) -> tuple[Run, list[Tensors]]:
    """timm's, in multi-tensor calls."""
    model = as_model(parameters)
    ema = importlib.import_module("timm.utils").ModelEmaV3(model, decay=DECAYS[0], foreach=True)
    return partial(ema.update, model), shadows_of(ema.module)


#: By the peer that offers each.
PACKAGES: dict[str, tuple[str, Averager]] = {
    "torch-averaged-model": ("AveragedModel", averaged_model),
    "torch-ema": ("torch-ema", torch_ema),
    "ema-pytorch": ("ema-pytorch", ema_pytorch),
    "timm": ("timm", timm_ema),
}
MODULES = {"torch-ema": "torch_ema", "ema-pytorch": "ema_pytorch", "timm": "timm", "apex": "apex"}

# ---- Steps of peers ------------------------------------------------------------------------------


def update_by(params: Tensors, grads: Tensors, *, op: Op, averager: Averager) -> Step:
    """Averages alone."""
    parameters = as_parameters(params, grads)
    update, averages = averager(parameters, op.averages)
    return Step(update, parameters, grads, None, averages)


def step_by(
    params: Tensors,
    grads: Tensors,
    *,
    op: Op,
    optimizer: Optimizer,
    averager: Averager | None = None,
    scale_in_step: bool = False,
) -> Step:
    """What the op has of: clipping, the optimizer's step, the update of averages, the reset.

    Args:
        params: The parameters.
        grads: Their gradients.
        op: What is to be done.
        optimizer: Makes the optimizer.
        averager: Averages after the step.
        scale_in_step: Leaves the scaling to the fused step, which can divide gradients by a scale
            that is meant for mixed precision (and stores the quotients).
    """
    parameters = as_parameters(params, grads)
    made = optimizer(parameters)
    averages: list[Tensors] = []
    parts: list[Run] = [made.step]
    if averager:
        update, averages = averager(parameters, op.averages)
        parts.append(update)
    if not op.clip:
        return Step(in_turn(parts), parameters, grads, buffers_of(made), averages)

    norms: Tensors = [torch.zeros(())]

    def clip() -> None:
        norms[0] = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)

    def leave_scale() -> None:
        norms[0] = torch.nn.utils.get_total_norm(grads, foreach=True)
        made.grad_scale = ((norms[0] + 1e-6) / MAX_NORM).clamp(min=1.0)  # type: ignore[attr-defined]

    reset = partial(torch.optim.Optimizer.zero_grad, made, set_to_none=False)  # apex has its own
    run = in_turn([leave_scale if scale_in_step else clip, *parts, reset])
    return Step(run, parameters, grads, buffers_of(made), averages, lambda: norms[0])


def in_turn(parts: list[Run]) -> Run:
    """Returns one call of all."""
    if len(parts) == 1:
        return parts[0]

    def run() -> None:
        for part in parts:
            part()

    return run


def masters_by_torch(params: Tensors, grads: Tensors, *, apart: bool) -> Step:
    """Widens the gradients, steps float32 masters and averages them, rounds the parameters.

    Args:
        params: The parameters.
        grads: Their gradients.
        apart: One tensor after the other, so that its copies stay in cache, instead of one kind of
            work after the other in multi-tensor calls.
    """
    wide = [grad.float() for grad in grads]
    masters = as_parameters([param.float() for param in params], wide)
    optimizer = torch_sgd(masters, fused=True)
    for master in masters:
        optimizer.state[master]["momentum_buffer"] = torch.zeros_like(master)
    aliases, (shadows,) = aliases_and_shadows(masters, 1)
    weight = WEIGHTS[0]

    def together() -> None:
        torch._foreach_copy_(wide, grads)
        optimizer.step()
        torch._foreach_copy_(params, aliases)
        torch._foreach_lerp_(shadows, aliases, weight)

    momentum = buffers_of(optimizer)
    rows = list(zip(params, grads, wide, aliases, shadows, strict=True))
    buffers = momentum()

    def one_by_one() -> None:
        for (param, grad, copy, master, shadow), buffer in zip(rows, buffers, strict=True):
            copy.copy_(grad)
            fused_sgd([master], [copy], [buffer])
            param.copy_(master)
            shadow.lerp_(master, weight)

    run = one_by_one if apart else together
    return Step(run, params, grads, momentum, [shadows], masters=lambda: aliases)


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


def compiled_step(params: Tensors, grads: Tensors, *, op: Op) -> Step:
    """The op as one function of plain tensors under torch.compile, which fuses it per tensor."""
    masters = [param.float() for param in params] if op.master else None
    weights = masters or params
    momentum = [torch.zeros_like(weight) for weight in weights]
    _, averages = aliases_and_shadows(weights, op.averages)
    norms: Tensors = [torch.zeros(())]

    @torch.compile(fullgraph=True, dynamic=False)
    def step(
        params: Tensors,
        weights: Tensors,
        grads: Tensors,
        momentum: Tensors,
        averages: list[Tensors],
    ) -> Tensor:
        norm = torch.zeros((), device=params[0].device)
        if op.clip:
            norm = sum((g.float() ** 2).sum() for g in grads).sqrt()  # type: ignore[union-attr]
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for i, (p, w, g, v) in enumerate(zip(params, weights, grads, momentum, strict=True)):
            if op.sgd:
                d = (g * scale if op.clip else g.to(w.dtype)) + WEIGHT_DECAY * w
                v.mul_(MOMENTUM).add_(d)
                w.add_(v, alpha=-LR)
            if op.master:
                p.copy_(w)
            for shadows, weight in zip(averages, WEIGHTS, strict=False):
                shadows[i].lerp_(w.to(shadows[i].dtype), weight)
            if op.clip:
                g.zero_()
        return norm

    def run() -> None:
        norms[0] = step(params, weights, grads, momentum, averages)

    return Step(
        run,
        params,
        grads,
        (lambda: momentum) if op.sgd else None,
        averages,
        (lambda: norms[0]) if op.clip else None,
        (lambda: masters) if masters else None,
    )


# ---- Who takes part ------------------------------------------------------------------------------


FUSED_IS_WRONG = "refused, wrong for half types on the CPU (pytorch #191763)"


def absence(peer: str, place: Place) -> str | None:
    """Says why a peer cannot do an op, or None where it can."""
    module = MODULES.get(peer)
    if module and importlib.util.find_spec(module) is None:
        needs = ", and needs CUDA" if peer == "apex" and place.device.type == "cpu" else ""
        return f"absent, not installed{needs}"
    if peer == "apex" and place.device.type == "cpu":
        return "absent, needs CUDA"
    if peer in PACKAGES and place.op.averages > 1:
        return "left out, keeps one average"
    if peer in PACKAGES and place.half:
        return "refused, keeps shadows in half precision"
    if peer == "torch-fused" and place.half and place.device.type == "cpu" and not place.op.master:
        return FUSED_IS_WRONG
    return no_compilation(place) if peer == "torch-compile" else None


def no_compilation(place: Place) -> str | None:
    """Says why a step is not compiled, or None where it is."""
    limit = COMPILED_TENSORS[place.device.type]
    if not place.compiles:
        return "left out of a quick run, which compiling would take longer than"
    if place.tensors > limit:
        return f"left out, compiling takes minutes for {place.tensors} tensors (limit {limit})"
    if place.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "absent, needs a C++ compiler"
    if place.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "absent, needs the package triton"
    return None


def providers(place: Place, against: list[str] | None = None) -> list[Provider]:
    """Returns the contestants of an op, fused_opt first.

    Args:
        place: Op, device, dtype and number of tensors.
        against: The peers to take; None takes all that are worth a look.
    """
    ours = Provider(OURS, OURS, partial(fused_opt_step, op=place.op))
    if place.op.master:
        peers = master_peers()
    elif place.op.sgd:
        peers = step_peers(place)
    else:
        peers = update_peers(place)
    peers.append(Provider("torch-compile", "torch-compile", partial(compiled_step, op=place.op)))
    if against is None and not loop_matters(place):
        peers = [each for each in peers if each.peer != "torch-forloop"]
    chosen = [each for each in peers if against is None or each.peer in against]
    return [ours, *(with_absence(each, place) for each in chosen)]


def with_absence(provider: Provider, place: Place) -> Provider:
    """Returns the provider with the reason why it cannot take part, where there is one."""
    why = absence(provider.peer, place)
    return Provider(provider.name, provider.peer, provider.setup, why)


def loop_matters(place: Place) -> bool:
    """Tells whether the plain loop may win: where there is no fused step, and with half types."""
    return place.half and (place.device.type == "cpu" or not place.op.sgd)


def master_peers() -> list[Provider]:
    """By torch: all copies at once, or tensor by tensor."""
    return [
        Provider("copy+fused+copy+lerp", "torch-fused", partial(masters_by_torch, apart=False)),
        Provider("the same, one by one", "torch-fused", partial(masters_by_torch, apart=True)),
    ]


def update_peers(place: Place) -> list[Provider]:
    """Averages alone."""

    def provider(peer: str, name: str, averager: Averager) -> Provider:
        return Provider(name, peer, partial(update_by, op=place.op, averager=averager))

    return [
        provider("torch-foreach", "foreach-lerp", foreach_lerp),
        provider("torch-forloop", "lerp", float_lerp),
        *(provider(peer, name, averager) for peer, (name, averager) in PACKAGES.items()),
    ]


def step_peers(place: Place) -> list[Provider]:
    """Every optimizer with the fastest averages; the packages of averages after torch's step."""
    op, peers = place.op, []

    def add(peer: str, name: str, **how: Any) -> None:
        peers.append(Provider(name, peer, partial(step_by, op=op, **how)))

    clip = "clip+" if op.clip else ""
    averagers: dict[str, Averager | None] = {"": None}
    if op.averages:
        averagers = {"+lerp": foreach_lerp}
        if place.half:
            averagers["+float-lerp"] = float_lerp
    for peer, optimizer in OPTIMIZERS.items():
        for suffix, averager in averagers.items():
            add(peer, f"{clip}{peer}{suffix}", optimizer=optimizer, averager=averager)
            if op.clip and peer == "torch-fused":
                how = {"optimizer": optimizer, "averager": averager, "scale_in_step": True}
                add(peer, f"torch-fused(scale){suffix}", **how)
    if op.averages and not op.clip:
        for peer, (name, averager) in PACKAGES.items():
            optimizer = OPTIMIZERS["torch-fused"]
            add(peer, f"torch-fused+{name}", optimizer=optimizer, averager=averager)
    return peers
