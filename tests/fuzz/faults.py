"""What can be wrong with a step: each fault is caused in a run, must be raised, and is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_opt
from fused_opt import schedules
from fuzz.run import Run

Undo = Callable[[], None]


class Fault(NamedTuple):
    """``cause`` brings it about for a parameter with a gradient; None where it cannot."""

    error: type[BaseException] | tuple[type[BaseException], ...]
    cause: Callable[[Run, str], Undo | None]


class Interrupted(BaseException):
    """What a closure or a hook of the user's raises, which nobody expects."""


def nothing() -> None:
    """There is nothing to undo."""


def _replaced_grad(change: Callable[[Tensor], Tensor]) -> Callable[[Run, str], Undo | None]:
    """The gradient as the change makes it, through `.data`, which torch does not check."""

    def cause(run: Run, name: str) -> Undo | None:
        param = run.params[name]
        kept = param.grad
        if kept is None or kept.is_sparse:
            return None
        param.grad = torch.zeros_like(param)
        param.grad.data = change(kept.detach())

        def undo() -> None:
            param.grad = kept

        return undo

    return cause


def _option(option: str, value: Any) -> Callable[[Run, str], Undo | None]:
    """An option of the parameter's group."""

    def cause(run: Run, name: str) -> Undo | None:
        group = _group_of(run, name)
        kept = group[option]
        group[option] = value

        def undo() -> None:
            group[option] = kept

        return undo

    return cause


def _group_of(run: Run, name: str) -> dict[str, Any]:
    param = run.params[name]
    return next(g for g in run.optimizer.param_groups if any(p is param for p in g["params"]))


def _state(change: Callable[[Tensor], Any]) -> Callable[[Run, str], Undo | None]:
    """The momentum that the step would read."""

    def cause(run: Run, name: str) -> Undo | None:
        group, state = _group_of(run, name), run.optimizer.state.get(run.params[name], {})
        key = {"torch": "momentum_buffer", "sutskever": "velocity"}[group["formulation"]]
        kept = state.get(key)
        if kept is None or not group["momentum"]:
            return None
        state[key] = change(kept)

        def undo() -> None:
            state[key] = kept

        return undo

    return cause


def _shared_memory(run: Run, name: str) -> Undo | None:
    """Two parameters in one place; those of sparse gradients are stepped by torch, one by one."""
    param = run.params[name]
    stepped = [
        p
        for g in run.optimizer.param_groups
        for p in g["params"]
        if p.grad is not None and not p.grad.is_sparse and p.dtype == param.dtype and p.numel()
    ]
    others = [p for p in stepped if p is not param]
    if not others or len(others) == len(stepped):
        return None
    kept, other = param.data, others[0].data
    shared = torch.zeros(param.numel() + other.numel() - 1, dtype=param.dtype)
    shared[: param.numel()] = param.data.flatten()
    kept_other = others[0].data
    param.data = shared[: param.numel()].view(param.shape)
    others[0].data = shared[param.numel() - 1 :].view(other.shape)

    def undo() -> None:
        param.data, others[0].data = kept, kept_other

    return undo


def _sparse_with_decay(run: Run, name: str) -> Undo | None:
    param, group = run.params[name], _group_of(run, name)
    kept, decay, decoupled = param.grad, group["weight_decay"], group["decoupled_weight_decay"]
    if param.dim() != 1 or kept is None:
        return None
    param.grad = kept if kept.is_sparse else kept.to_sparse()
    group.update(weight_decay=0.1, decoupled_weight_decay=False)

    def undo() -> None:
        param.grad = kept
        group.update(weight_decay=decay, decoupled_weight_decay=decoupled)

    return undo


def _norms_differ(run: Run, name: str) -> Undo | None:
    return None if len(run.optimizer.param_groups) < 2 else _option("max_grad_norm", 7.5)(run, name)


def _hook(run: Run, name: str) -> Undo | None:
    def raises(*_: Any) -> None:
        raise Interrupted

    return run.optimizer.register_step_pre_hook(raises).remove


def _decay(rule: Any) -> Callable[[Run, str], Undo | None]:
    """A decay that is none, where the next step averages."""

    def cause(run: Run, name: str) -> Undo | None:
        ema = run.ema
        if ema is None or not run.is_attached:
            return None
        steps = ema.num_steps
        if steps % run.every or steps < run.after:
            return None
        kept = list(ema._decays)
        ema._decays[-1] = rule

        def undo() -> None:
            ema._decays[:] = kept

        return undo

    return cause


def _raises(k: int) -> float:
    raise Interrupted


FAULTS: dict[str, Fault] = {
    "a gradient of another shape": Fault(ValueError, _replaced_grad(lambda g: g.new_ones(2, 3, 1))),
    "a longer gradient": Fault(
        ValueError, _replaced_grad(lambda g: torch.ones(g.numel() + 1, dtype=g.dtype))
    ),
    "an integer gradient": Fault(ValueError, _replaced_grad(lambda g: g.to(torch.int32))),
    "a complex gradient": Fault(
        (ValueError, RuntimeError),
        _replaced_grad(lambda g: g.to(torch.complex64)),
    ),
    "a gradient of another dtype": Fault(
        ValueError,
        _replaced_grad(lambda g: g.float() if g.dtype == torch.float64 else g.double()),
    ),
    "a sparse gradient that decays": Fault(RuntimeError, _sparse_with_decay),
    "momentum of another shape": Fault(ValueError, _state(lambda v: v.new_zeros(3, 1, 2))),
    "momentum of another dtype": Fault(
        ValueError, _state(lambda v: v.float() if v.dtype == torch.float64 else v.double())
    ),
    "momentum that is a number": Fault(TypeError, _state(lambda _: 0.5)),
    "momentum that is a list": Fault(TypeError, _state(lambda v: v.flatten().tolist())),
    "parameters that overlap": Fault(ValueError, _shared_memory),
    "an unknown formulation": Fault(ValueError, _option("formulation", "adam")),
    "an unknown refinement": Fault(ValueError, _option("master_weights", "fp8")),
    "a learning rate of two": Fault(ValueError, _option("lr", torch.tensor([0.1, 0.2]))),
    "a learning rate in words": Fault((TypeError, ValueError), _option("lr", "fast")),
    "a seed below 0": Fault(
        ValueError,
        lambda run, name: (
            _option("rounding_seed", -1)(run, name)
            if _group_of(run, name)["stochastic_rounding"]
            else None
        ),
    ),
    "norms that differ": Fault(ValueError, _norms_differ),
    "a closure that raises": Fault(Interrupted, lambda run, name: nothing),
    "a hook that raises": Fault(Interrupted, _hook),
    "a decay above 1": Fault(ValueError, _decay(1.5)),
    "a decay that raises": Fault(Interrupted, _decay(_raises)),
    "a schedule out of range": Fault(ValueError, _decay(lambda k: schedules.constant(2.0)(k))),
}
KINDS = tuple(FAULTS)


def stepping(run: Run, fault: Fault, how: str) -> Callable[[], Any]:
    """A way to step that meets the fault."""
    if fault is FAULTS["a closure that raises"]:

        def raises() -> float:
            raise Interrupted

        return lambda: run.optimizer.step(raises)
    if how == "closure":
        return lambda: run.optimizer.step(lambda: 1.0)
    if how == "scaler":
        scaler = fused_opt.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.zeros(()))
        return lambda: scaler.step(run.optimizer)
    return run.optimizer.step
